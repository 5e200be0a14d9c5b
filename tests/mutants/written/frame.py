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
        "images of another size or number of channels are others",
    ),
    Row(
        "accepted-forgets-structure",
        "x.device), structure, facts)",
        "x.device), None, facts)",
        "a list of parameters is not a tuple of them",
    ),
    Row(
        "accepted-forgets-shapes-of-params",
        'attrgetter("shape", "dtype", "device")',
        'attrgetter("dtype", "device")',
        "parameters of another layer may have the same structure",
    ),
    Row(
        "accepted-forgets-dtypes-of-params",
        'attrgetter("shape", "dtype", "device")',
        'attrgetter("shape", "device")',
        "each parameter has x's dtype",
    ),
    Row(
        "memory-in-equality",
        "    _fresh: ClassVar[bool] = False\n",
        "    _fresh: ClassVar[bool] = False\n"
        '    _accepted: Any = __import__("dataclasses").field(default=(), init=False)\n',
        "a network that has run equals one that has not",
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
        "if not is_eager() or (type(x) not in TENSORS",
        "if False or (type(x) not in TENSORS",
        "a shape under torch.func is not the tensor's shape outside",
    ),
    Row(
        "gradients-in-other-containers",
        "return structure.unflatten(structure.flatten_up_to(dparams))",
        "return dparams",
        "a gradient is a tree like params",
    ),
    Row(
        "order-of-params-lost",
        "return structure.unflatten(structure.flatten_up_to(dparams))",
        "return dparams if structure == optree.tree_structure(dparams) else "
        "structure.unflatten(structure.flatten_up_to(dparams))",
        "a gradient has the order of params, which equal structures may lack",
    ),
    Row(
        "mixins-bypassed",
        "    return cls.fwd is not Layer.fwd or cls.bwd is not Layer.bwd\n",
        '    return "fwd" in cls.__dict__ or "bwd" in cls.__dict__\n',
        "a Sequential calls the fwd that a mixin has overridden",
    ),
    Row(
        "residuals-are-a-view-of-x",
        "(without_entries(x), residuals)",
        "(x[None][:0], residuals)",
        "residuals share no memory with x unless bwd needs it",
    ),
    Row(
        "vjp-ignores-param-grad",
        "need = Need(param_grad, input_grad)\n",
        "need = Need(True, input_grad)\n",
        "vjp computes what is asked for",
    ),
    Row(
        "vjp-ignores-input-grad",
        "need = Need(param_grad, input_grad)\n",
        "need = Need(param_grad, True)\n",
        "vjp computes what is asked for",
    ),
    Row(
        "vjp-of-a-users-layer-ignores-what-is-asked-for",
        "return public_bwd(layer, params, residuals, grad, need)\n\n\ndef like_params",
        "return public_bwd(layer, params, residuals, grad, Need(True, True))\n\n\ndef like_params",
        "vjp computes what is asked for",
    ),
    Row(
        "public-bwd-consumes",
        "self._checked_bwd(params, residuals, grad, Need(param_grad, input_grad))",
        "self._checked_bwd(params, residuals, grad, Need(param_grad, input_grad, True))",
        "bwd may be called twice on the same residuals",
    ),
)

PARAM = in_file(
    "param.py",
    "test_layer.py test_properties.py",
    Row(
        "one-key-for-all-params",
        "keys = iter(split(key, max(1, len(_flat(declared, declared)))))",
        "keys = iter([key] * len(_flat(declared, declared)))",
        "parameters are drawn independently",
    ),
    Row(
        "keys-from-the-last",
        "keys = iter(split(key, max(1, len(_flat(declared, declared)))))",
        "keys = iter(split(key, max(1, len(_flat(declared, declared))))[::-1])",
        "a parameter declared behind others does not change their numbers",
    ),
)

NESTED = in_file(
    "param.py",
    "test_attention.py",
    Row(
        "nested-params-without-keys",
        "split(key, max(1, len(_flat(declared, declared))))",
        "split(key, max(1, len(declared)))",
        "every parameter in a dict of a dict has a key",
    ),
)

DEVICES = in_file(
    "layer.py",
    "test_gate_properties.py::test_tensors_on_another_device_are_refused test_layer.py",
    Row(
        "accepted-forgets-device",
        "*shape[1:], x.dtype, x.device),",
        "*shape[1:], x.dtype),",
        "what has been accepted on one device is not accepted on another",
    ),
    Row(
        "accepted-forgets-devices-of-params",
        'attrgetter("shape", "dtype", "device")',
        'attrgetter("shape", "dtype")',
        "each parameter is on x's device",
    ),
)

PICKLES = in_file(
    "fields.py",
    "test_layer.py",
    Row(
        "memory-in-pickles",
        "return {field.name: getattr(self, field.name) for field in fields(self) if field.init}",
        "return dict(vars(self))",
        "what has been accepted stays out of pickles",
    ),
)

LAYOUT = in_file(
    "param.py",
    "test_upsample_conv.py::test_the_weight_is_laid_out_tap_by_tap",
    Row(
        "layout-forgotten",
        "params[name] = value if layout is None else layout(value)",
        "params[name] = value",
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
        "layer._bwd(own, kept.pop(), dx, wanted)",
        "layer._bwd(own, kept.pop(0), dx, wanted)",
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
        "first-to-learn-left-out",
        "                return i\n",
        "                return i + 1\n",
        "the first layer with parameters learns",
    ),
    Row(
        "names-of-the-rest",
        "self.layers[index], self.names[index]",
        "self.layers[index], self.names[: len(self.layers[index])]",
        "a slice keeps the names of its layers",
    ),
)

BRANCHES = in_file(
    "combinators/branches.py",
    "test_combinators.py",
    Row(
        "residuals-of-branches-from-the-front",
        "owns[at.i], rest.pop()",
        "owns[at.i], rest.pop(0)",
        "the last branch's residuals are the last",
    ),
    Row(
        "branches-consume-whatever-is-asked",
        "        rest = rest if need.consume else list(rest)\n",
        "",
        "bwd may be called twice on the same residuals",
    ),
    Row(
        "gradients-of-branches-over-what-others-hold",
        "dx, is_own = more, self._is_new(at.i)",
        "dx, is_own = more, True",
        "dx of a layer that promises nothing may be its residual",
    ),
)

TURNS = in_file(
    "combinators/turns.py",
    "test_combinators.py",
    Row(
        "residuals-of-turns-from-the-front",
        "owns[i], rest.pop(), dx",
        "owns[i], rest.pop(0), dx",
        "the last turn's residuals are the last",
    ),
    Row(
        "turns-consume-whatever-is-asked",
        "rest = residuals if need.consume else list(residuals)",
        "rest = residuals",
        "bwd may be called twice on the same residuals",
    ),
    Row(
        "one-key-for-all-turns-of-fwd",
        "x, kept = run_fwd(self.layer, own, x, key_of(key, i))",
        "x, kept = run_fwd(self.layer, own, x, key)",
        "turns draw independently, in fwd as in apply",
    ),
    Row(
        "one-key-for-all-turns-of-apply",
        "x = run_apply(self.layer, own, x, key_of(key, i))",
        "x = run_apply(self.layer, own, x, key)",
        "turns draw independently",
    ),
)

LOOP = in_file(
    "combinators/loop.py",
    "test_combinators.py",
    Row(
        "loop-starts-from-another-key",
        "super()._init(fold_in(key, 0), shape",
        "super()._init(key, shape",
        "a loop starts from the parameters of turn 0",
    ),
)

REPEAT = in_file(
    "combinators/repeat.py",
    "test_combinators.py",
    Row(
        "copies-start-alike",
        "self.layer.init(fold_in(key, i), shape",
        "self.layer.init(fold_in(key, 0), shape",
        "copies are drawn independently",
    ),
)

RECOMPUTE = in_file(
    "combinators/recompute.py",
    "test_combinators.py",
    Row(
        "recomputed-without-the-key",
        "again = run_fwd(self.layer, params, x, key)[1]",
        "again = run_fwd(self.layer, params, x, None)[1]",
        "masks are the same the second time",
    ),
    Row(
        "recomputed-with-another-key",
        "return run_apply(self.layer, params, x, key), (x, key)",
        'own = key and __import__("funcnet").fold_in(key, 1)\n'
        "        return run_apply(self.layer, params, x, key), (x, own)",
        "masks are the same the second time",
    ),
)

REVERSIBLE = in_file(
    "combinators/reversible.py",
    "test_combinators.py",
    Row(
        "reversed-with-another-key",
        "made, kept = run_fwd(layer, own, a, key_of(key, at.i))",
        "made, kept = run_fwd(layer, own, a, key)",
        "masks are the same the second time",
    ),
)

MICRO_BATCHES = in_file(
    "gradients.py",
    "test_gradients.py",
    Row(
        "one-key-for-all-micro-batches",
        "own = None if key is None else fold_in(key, j)",
        "own = key",
        "micro-batches draw independently",
    ),
)

CHECKS = in_file(
    "checks.py",
    "test_errors.py test_optimizers.py",
    Row(
        "nan-is-a-number",
        "if not (-_INF < number < _INF and least <= number <= most):",
        "if number < least or number > most or number == _INF:",
        "NaN is out of range",
    ),
)

FRAME = (
    *LAYER,
    *PARAM,
    *NESTED,
    *DEVICES,
    *PICKLES,
    *LAYOUT,
    *SEQUENTIAL,
    *SEVERAL,
    *BRANCHES,
    *TURNS,
    *LOOP,
    *REPEAT,
    *RECOMPUTE,
    *REVERSIBLE,
    *MICRO_BATCHES,
    *CHECKS,
)
