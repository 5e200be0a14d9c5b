"""Bugs in what the frame derives: what is checked once, keys, what works in place, residuals."""

from __future__ import annotations

from ..mutant import Row, in_file

LAYER = in_file(
    "layer.py",
    "test_layer.py test_sequential.py test_properties.py::test_what_is_not_asked_for_is_none",
    Row(
        "accepted-forgets-dtype",
        "*shape[1:], x.dtype, x.device),",
        "*shape[1:], x.device),",
        "what has been accepted in float32 is not accepted in float64",
    ),
    Row(
        "accepted-forgets-shape",
        "(len(shape), *shape[1:], x.dtype,",
        "(len(shape), x.dtype,",
        "pictures of another size or number of channels are others",
    ),
    Row(
        "accepted-forgets-structure",
        "                structure,\n",
        "                None,\n",
        "a list of parameters is no tuple of them",
    ),
    Row(
        "accepted-forgets-shapes-of-params",
        "[(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]",
        "[(leaf.dtype, leaf.device) for leaf in leaves]",
        "parameters of another layer may have the same structure",
    ),
    Row(
        "accepted-forgets-dtypes-of-params",
        "[(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]",
        "[(leaf.shape, leaf.device) for leaf in leaves]",
        "each parameter has x's dtype",
    ),
    Row(
        "refused-is-remembered",
        "        y = self._check(params, _spec(self, x, shape))\n",
        "        y = _spec(self, x, shape)\n"
        '        self.__dict__["_accepted"] = ((seen, y), *accepted)\n'
        "        y = self._check(params, y)\n",
        "what has been refused is refused again",
    ),
    Row(
        "remembered-under-transforms",
        "        if not is_plain():\n            return self._check(",
        "        if False:\n            return self._check(",
        "a shape under torch.func is not that of the tensor outside",
    ),
    Row(
        "one-key-for-all-params",
        "keys = iter(split(key, max(1, len(_flat(declared)))))",
        "keys = iter([key] * len(_flat(declared)))",
        "parameters are drawn independently",
    ),
    Row(
        "keys-from-the-last",
        "keys = iter(split(key, max(1, len(_flat(declared)))))",
        "keys = iter(split(key, max(1, len(_flat(declared))))[::-1])",
        "a parameter declared behind others does not change their numbers",
    ),
    Row(
        "gradients-in-other-containers",
        "return structure.unflatten(structure.flatten_up_to(dparams))",
        "return dparams",
        "a gradient is a tree like params",
    ),
    Row(
        "public-bwd-consumes",
        "self._checked_bwd(params, residuals, grad, Need(param_grad, input_grad))",
        "self._checked_bwd(params, residuals, grad, Need(param_grad, input_grad, True))",
        "bwd may be called twice on the same residuals",
    ),
)

NESTED = in_file(
    "layer.py",
    "test_attention.py",
    Row(
        "nested-params-without-keys",
        "split(key, max(1, len(_flat(declared))))",
        "split(key, max(1, len(declared)))",
        "every parameter in a dict of a dict has a key",
    ),
)

LAYOUT = in_file(
    "layer.py",
    "test_upsample_conv.py::test_the_weight_is_laid_out_tap_by_tap",
    Row(
        "layout-forgotten",
        "return value if param.layout is None else param.layout(value)",
        "return value",
        "a new parameter is laid out as its layer says",
    ),
)

SEQUENTIAL = in_file(
    "combinators/sequential.py",
    "test_sequential.py test_gate_properties.py",
    Row(
        "over-x-of-a-layer-too-early",
        "before, behind = [False, *fresh],",
        "before, behind = fresh,",
        "a layer writes over what the layer before has made, not over what it will make",
    ),
    Row(
        "over-grad-by-the-layer-before",
        "[*fresh[1:], False]",
        "[False, *fresh]",
        "a layer writes over the grad that the layer behind has made",
    ),
    Row(
        "fresh-by-its-first-layer",
        "all([*fresh[:1], *fresh[-1:]])",
        "all(fresh[:1])",
        "y is the last layer's",
    ),
    Row(
        "fresh-by-its-last-layer",
        "all([*fresh[:1], *fresh[-1:]])",
        "all(fresh[-1:])",
        "dx is the first layer's",
    ),
    Row(
        "residuals-from-the-front",
        "run_bwd(layer, own, kept.pop(), dx, wanted)",
        "run_bwd(layer, own, kept.pop(0), dx, wanted)",
        "the last layer's residuals are the last",
    ),
    Row(
        "residuals-of-what-works-in-place-from-the-front",
        "layer._bwd_(own, kept.pop(), dx, wanted)",
        "layer._bwd_(own, kept.pop(0), dx, wanted)",
        "the last layer's residuals are the last",
    ),
    Row(
        "consumes-whatever-is-asked",
        "kept = residuals if need.consume else list(residuals)",
        "kept = residuals",
        "bwd may be called twice on the same residuals",
    ),
    Row(
        "one-key-for-all-layers-of-apply",
        "own = None if key is None else fold_in(key, at.i)\n"
        "                if in_place and self._over_x[at.i]:\n"
        "                    x = ",
        "own = key\n                if in_place and self._over_x[at.i]:\n                    x = ",
        "layers draw independently",
    ),
    Row(
        "one-key-for-all-layers-of-fwd",
        "own = None if key is None else fold_in(key, at.i)\n"
        "                if in_place and self._over_x[at.i]:\n"
        "                    x, kept = ",
        "own = key\n"
        "                if in_place and self._over_x[at.i]:\n"
        "                    x, kept = ",
        "fwd draws what apply draws",
    ),
    Row(
        "first-to-learn-left-out",
        "                return i\n",
        "                return i + 1\n",
        "the first layer with parameters learns",
    ),
)

SEVERAL = in_file(
    "combinators/several.py",
    "test_sequential.py test_combinators.py",
    Row(
        "one-key-for-all-layers-of-init",
        "layer.init(fold_in(key, at.i), own,",
        "layer.init(key, own,",
        "layers are drawn independently",
    ),
    Row(
        "one-key-for-all-branches",
        "return None if key is None else fold_in(key, i)",
        "return key",
        "branches draw independently",
    ),
    Row(
        "names-of-the-rest",
        "self.layers[index], self.names[index]",
        "self.layers[index], self.names[: len(self.layers[index])]",
        "a slice keeps the names of its layers",
    ),
)

CHECKS = in_file(
    "checks.py",
    "test_errors.py test_optimizers.py",
    Row(
        "true-is-one",
        "if number is None or isinstance(value, bool):",
        "if number is None:",
        "Conv2d(True, 3) is a mistake",
    ),
    Row(
        "nan-is-a-number",
        'if not (float("-inf") < number < float("inf") and number >= least):',
        'if number < least or number == float("inf"):',
        "NaN is out of range",
    ),
)

FRAME = (*LAYER, *NESTED, *LAYOUT, *SEQUENTIAL, *SEVERAL, *CHECKS)
