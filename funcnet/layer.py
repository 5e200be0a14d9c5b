"""The layer: a frozen dataclass of hyperparameters with pure functions on parameter trees.

Callers call `init`, `out_shape`, `apply`, `vjp`, `fwd` and `bwd`, which check their arguments.
Authors write the mathematics; their functions are handed checked arguments only:

    >>> from dataclasses import dataclass
    >>> import funcnet as fn
    >>> import torch
    >>> from funcnet.initializers import Uniform
    >>> @dataclass(frozen=True)
    ... class Scale(fn.Layer):
    ...     "y = w ∘ x, a weight for each channel; dx = w ∘ dy, dw = Σ x ∘ dy over N, H and W."
    ...
    ...     _axes = "CHW"
    ...
    ...     def _params(self, shape):
    ...         return {"weight": fn.Param((shape[0], 1, 1), Uniform(-1, 1))}
    ...
    ...     def _fwd(self, params, x, key):
    ...         return params["weight"] * x, x
    ...
    ...     def _bwd(self, params, x, dy, need):
    ...         dweight = (x * dy).sum((0, 2, 3))[:, None, None] if need.params else None
    ...         return {"weight": dweight}, params["weight"] * dy if need.input else None
    >>> layer = Scale()
    >>> params = layer.init(fn.key(0), (3, 4, 4))
    >>> layer.apply(params, torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    >>> layer.apply(params, torch.ones(2, 5, 4, 4))
    Traceback (most recent call last):
    ValueError: Scale(): expected x of shape (N, 3, H, W), got (2, 5, 4, 4)

A layer may also write the public four (`init`, `out_shape`, `fwd`, `bwd`) and nothing else. Then it
checks its own arguments, and its `bwd` need not know of `param_grad`.

What a layer returns shares no memory with what it was handed: where an operation may return a view
of x, as `flatten` does, the view has to be cloned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from funcnet.checks import (
    as_pair,
    as_shape,
    broken_promise,
    check_like,
    check_tensor,
    count_of,
    is_pair,
    name_of,
    returned,
    shown,
    sizes,
    unwrapped,
)
from funcnet.fields import Hyperparameters, signature_of, source
from funcnet.initializers import Device
from funcnet.keys import Key, check_draw, check_key
from funcnet.ops.autocast import without_autocast
from funcnet.ops.inplace import TENSORS, are_open, is_eager, is_tracing
from funcnet.ops.need import Need
from funcnet.ops.trees import structure_of
from funcnet.ops.without_entries import without_entries
from funcnet.param import (
    Layout,
    check_declared,
    check_no_params,
    draw,
    first_tensor,
    misshapen,
    size_that_fits,
)

Tree: TypeAlias = Any
"""Nested containers of tensors, as `optree` understands them."""

Shape: TypeAlias = tuple[int, ...]

Joins: TypeAlias = Literal["apart", "stacked", "added", "zeros"]
Part: TypeAlias = tuple[slice, ...]
"""A part of an image, as a slice for each axis after the channels."""


class Spec(NamedTuple):
    """A tensor before it is computed: its batch (N,), shape of one example, dtype and device.

    The batch is () for a tensor without axes.
    """

    batch: Shape
    shape: Shape
    dtype: torch.dtype
    device: torch.device


class _TrueOfChildren:
    """The value of `couples_examples`: True for a layer with a child for which it is True."""

    def __get__(self, layer: Layer | None, cls: type) -> bool:
        children = () if layer is None else layer._children()
        return any(child.couples_examples for _, child in children)


@dataclass(frozen=True)
class Layer(Hyperparameters):
    """A pure function y = f(params, x) with its gradient, described by hyperparameters alone.

    Shapes: `shape` is the shape of one example, (C, H, W); x and y put the batch first,
    (N, C, H, W).

    `fwd` returns y and the residuals, the least that `bwd` needs; `bwd` returns the gradients of
    Σ grad ∘ y with respect to params (a tree like params) and to x. Both are pure: nothing is
    written to a tensor that was handed in, and no state is kept between them.

    All raise ValueError or TypeError, naming the layer, for arguments that do not fit it.

    >>> import funcnet as fn
    >>> import torch
    >>> layer = fn.Linear(2)
    >>> params, x = layer.init(fn.key(0), (3,)), torch.ones(4, 3)
    >>> y, residuals = layer.fwd(params, x)
    >>> dparams, dx = layer.bwd(params, residuals, torch.ones(4, 2))
    >>> y.shape, dparams["weight"].shape, dx.shape
    (torch.Size([4, 2]), torch.Size([2, 3]), torch.Size([4, 3]))
    """

    _fresh: ClassVar[bool] = False
    """The promise that y shares no memory with the residuals, nor dx with residuals or dparams.

    Nor do the entries of y or of dx share memory with each other, as in an expanded tensor.
    What follows such a layer in a Sequential may write over its results, and does so where it has
    `_fwd_` and `_bwd_`, which do in place what `_fwd` and `_bwd` do. `check_vjp` verifies this.
    """

    _views: ClassVar[bool] = False
    """Whether `_fwd_` and `_bwd_` write nothing: y is a view of x and dx one of dy, or new.

    A combinator that copies its layers' results calls `_fwd_` and `_bwd_` of such a layer.
    """

    _joins: ClassVar[Joins | None] = None
    """How a combinator's dparams are made of its children's: a part for each child ("apart"),
    those of its copies stacked along a new first axis ("stacked"), those of several runs added up
    ("added"), or zeros ("zeros"). A layer with None counts as one without children.
    """

    couples_examples: ClassVar[bool] = _TrueOfChildren()  # type: ignore[assignment]
    """Whether y of an example depends on the others in its batch. Such a layer says True."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cls = type(self)
        if cls.fwd is Layer.fwd and cls._fwd is Layer._fwd:
            raise TypeError(f"{cls.__name__}: expected a layer that writes _fwd, or fwd")

    # --- What authors write. They may rename the arguments

    def _params(self, shape: Shape, /) -> Mapping[str, Any]:
        """The parameters for examples of `shape` by name: each a `Param`, or a dict of them."""
        return {}

    def _layout(self, name: str, /) -> Layout | None:
        """The memory format that the kernels want of a parameter; None for row-major."""
        return None

    def _out_shape(self, shape: Shape, /) -> Shape:
        """The shape of one example of y. Raises ValueError for a shape that does not fit."""
        return shape

    def _fwd(self, params: Any, x: Tensor, key: Key | None, /) -> tuple[Tensor, Any]:
        """(y, residuals)."""
        raise NotImplementedError

    def _bwd(self, params: Any, residuals: Any, grad: Tensor, need: Need, /) -> tuple[Any, Any]:
        """(dparams, dx); what is not needed may be None.

        It is called only if dx is needed, or dparams of a layer that has parameters.
        """
        raise NotImplementedError(f"{name_of(self)} writes neither _bwd nor bwd")

    def _bwd_each(
        self, params: Any, residuals: Any, grad: Tensor, need: Need, /
    ) -> tuple[Any, Any]:
        """(each, dx): what `_bwd` returns, but with gradients of the parameters for each example.

        A leaf of `each` is a tensor (N, …), or a form of `ops/products.py` that stands for one.
        `check_vjp` verifies it. A layer without it runs once for each example.
        """
        raise NotImplementedError

    def _tile(self, shape: Shape, part: Part, /) -> tuple[Part, Layer] | None:
        """(source, layer): a part of y is what `layer` makes of a part of x, its source.

        `shape` is the shape of one example of x. None where the part may depend on all of x.
        `combinators/tiling.py` works through large images by it. A layer that draws numbers does
        not write it: parts get no key.
        """
        return None

    # --- What callers call

    def init(
        self,
        key: Key,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Tree:
        """Parameters for examples of `shape`, drawn from `key`; () for a layer without any."""
        shape = self._as_shape(shape)
        check_draw(self, key, dtype, device)
        self.out_shape(shape)
        return self._init(key, shape, dtype, device)

    def out_shape(self, shape: Sequence[int]) -> Shape:
        """The shape of one example of y, given x's. No tensor is made."""
        return self._shape_of_y(self._as_shape(shape))

    def apply(self, params: Tree, x: Tensor, *, key: Key | None = None) -> Tensor:
        """y = f(params, x)."""
        if checks_itself(self):
            made = self.fwd(params, x, key=key)
            y: Tensor = (made if type(made) is tuple else as_pair(self, "fwd", made))[0]
            return y
        promised, is_new = self._admit(params, x, getattr(x, "shape", ()), key)
        with without_autocast(x):
            y = y_alone(self, params, x, key)
            if is_new or y is None:
                self._expect_promised(y, promised, lambda: self._fwd(params, x, key))
        return y

    def fwd(self, params: Tree, x: Tensor, *, key: Key | None = None) -> tuple[Tensor, Any]:
        """(y, residuals). `key` is for layers that draw numbers; without one they evaluate."""
        promised, is_new = self._admit(params, x, getattr(x, "shape", ()), key)
        with without_autocast(x):
            made = self._fwd(params, x, key)
        is_whole = is_pair(made)
        if is_new or not is_whole:
            self._expect_promised(made[0] if is_whole else None, promised, lambda: made)
        y, residuals = made
        return y, (without_entries(x), residuals)

    def bwd(
        self,
        params: Tree,
        residuals: Any,
        grad: Tensor,
        *,
        input_grad: bool = True,
        param_grad: bool = True,
    ) -> tuple[Tree, Tensor | None]:
        """(dparams, dx), where grad has the shape of y.

        dx is None if `input_grad` is False or x is of integers, dparams if `param_grad` is False.
        """
        return self._checked_bwd(params, residuals, grad, Need(param_grad, input_grad))

    def vjp(
        self,
        params: Tree,
        x: Tensor,
        grad: Tensor,
        *,
        key: Key | None = None,
        input_grad: bool = True,
        param_grad: bool = True,
    ) -> tuple[Tree, Tensor | None]:
        """(dparams, dx): the vector-Jacobian product of `apply` with grad, which has y's shape."""
        y, residuals = as_pair(self, "fwd", self.fwd(params, x, key=key))
        need = Need(param_grad, input_grad)
        return last_bwd(self, params, residuals, grad, need, spec_of_y(y))

    # --- What combinators write

    def _init(self, key: Key, shape: Shape, dtype: torch.dtype | None, device: Device) -> Tree:
        declared = self._params(shape)
        if not declared:
            return ()
        check_declared(self, declared)
        return draw(self, declared, key, dtype, device, self._layout)

    def _apply(self, params: Any, x: Tensor, key: Key | None, /) -> Tensor:
        """y alone; None where `_fwd` returns nothing."""
        made = self._fwd(params, x, key)
        return None if made is None else made[0]

    def _check(self, params: Tree, x: Spec) -> Spec:
        """The spec of y. Raises unless params and x fit this layer and each other."""
        self._check_x(x)
        if self._axes is not None and not _has_rank(self._axes, x.shape):
            raise self._unfit(x)
        like = self._check_params(params, x)
        return Spec(x.batch, self._shape_of_y(x.shape), like.dtype, like.device)

    def _check_x(self, x: Spec, /) -> None:
        """Raise TypeError unless x is floating-point."""
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name_of(self)}: expected x to be floating-point, got {x.dtype}")

    def _learns(self, params: Tree) -> bool:
        """Whether there are parameters to compute gradients for."""
        return bool(optree.tree_leaves(params))

    def __repr__(self) -> str:
        return source(self, in_lines=bool(self._children()))

    def _children(self) -> tuple[tuple[str, Layer], ...]:
        """(name, layer) of each layer among the fields, as paths name it.

        A layer in the only such field has the name "". Layers in a tuple, or in several fields, are
        named by their positions.
        """
        found = _layer_fields(self)
        if len(found) == 1 and isinstance(only := found[0][1], Layer):
            return (("", only),)
        layers = [layer for _, value in found for layer in _as_tuple(value)]
        return tuple((str(i), layer) for i, layer in enumerate(layers))

    def _path_step(self, name: str) -> str:
        """A child on the path to a layer, as errors name it: `layer 1: `; "" for an only child."""
        return f"layer {name}: " if name else ""

    def _copy_axes(self) -> Shape:
        """The axes that its children's parameters have in front: (n,) for n copies of a child."""
        return ()

    def _child_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shape of one example of each child's x."""
        return (shape,) * len(self._children())

    def _child_params(self, params: Tree) -> tuple[Tree, ...]:
        """The parameters of each child; all of params for an only child without a name."""
        names = self._param_names(params)
        if names == [""]:
            return (params,)
        if not isinstance(params, Mapping):
            return (*params,)
        return self._part_by_child(names, [params[name] for name in names])

    def _part_by_child(self, names: Sequence[str], parts: Sequence[Any]) -> tuple[Any, ...]:
        """The part of each child, given those by name: a field of several layers has a tuple."""
        pairs = zip(self._sizes_of_fields(names), parts, strict=True)
        return tuple(own for size, part in pairs for own in ([part] if size is None else part))

    def _part_by_name(self, names: Sequence[str], parts: Iterable[Any]) -> list[Any]:
        """The parts by name, given the part of each child."""
        rest = iter(parts)
        sizes = self._sizes_of_fields(names)
        return [next(rest) if size is None else tuple(islice(rest, size)) for size in sizes]

    def _sizes_of_fields(self, names: Sequence[str]) -> list[int | None]:
        """The number of layers in each field of several; None for other names."""
        held: dict[str, Any] = {**dict(_layer_fields(self)), **dict(self._children())}
        return [len(held[n]) if isinstance(held[n], tuple) else None for n in names]

    def _param_names(self, params: Tree) -> list[str]:
        """The children's names in params: their own, or in a dict perhaps those of the fields.

        A field of several layers has a tuple there. An only one has its field's name in a layer
        that keeps parameters of its own beside it.
        """
        names = [name for name, _ in self._children()]
        if not isinstance(params, Mapping) or any(name in params for name in names):
            return names
        of_fields = [name for name, _ in _layer_fields(self)]
        if names != [""]:
            return of_fields
        (field,), ((_, only),) = of_fields, self._children()
        is_beside = field in params and checks_itself(self)
        # Otherwise all of params are the only child's, and may have an entry of that name.
        return of_fields if is_beside and field not in only._param_names(params) else names

    def _with_children(self, children: Sequence[Layer]) -> Layer:
        """The same combinator with other layers, one for each of its children."""
        rest = iter(children)
        return replace(
            self,
            **{
                name: next(rest) if isinstance(value, Layer) else tuple(next(rest) for _ in value)
                for name, value in _layer_fields(self)
            },
        )

    def _frozen_params(self, params: Tree) -> list[tuple[Tensor, Any]]:
        """(leaf, index) of the entries of params whose gradient is 0 on purpose."""
        children = self._children()
        owns = self._child_params(params) if children else ()
        pairs = zip(children, owns, strict=False)
        return [entry for (_, child), own in pairs for entry in child._frozen_params(own)]

    # --- The checks at the boundary

    def _checked_bwd(
        self, params: Tree, residuals: Any, grad: Tensor, need: Need, y: Spec | None = None
    ) -> tuple[Tree, Tensor | None]:
        """`bwd`; y is given where these params have just been accepted by `fwd`."""
        like, kept = unwrapped(self, residuals)
        y = y or self._admit(params, like, like.shape[1:])[0]
        if not isinstance(grad, Tensor) or grad.dtype != y.dtype or grad.device != y.device:
            check_like(self._describe_last(), "grad", grad, y, of="y")
        expected = (*like.shape[1:2], *y.shape)
        if grad.shape != expected:
            raise ValueError(
                f"{self._describe_last()}: expected grad of shape {expected}, "
                f"got {tuple(grad.shape)}"
            )
        if not like.is_floating_point():
            need = need._replace(input=False)
        if not asks(self, params, need):
            return zeros_like(params) if need.params else None, None
        with without_autocast(grad):
            made = self._bwd(params, kept, grad, need)
        dparams, dx = as_pair(self, "_bwd", made)
        return like_params(params, dparams) if need.params else None, dx if need.input else None

    def _admit(
        self, params: Tree, x: Any, shape: Shape, key: Key | None = None
    ) -> tuple[Spec, bool]:
        """(the spec of y, whether it is new). Raises unless params and x fit.

        Shapes, dtypes and devices that have been accepted are remembered, and not checked again.
        """
        if key is not None:
            check_key(self, key)
        # Open sizes that are compared with others would be fixed to them.
        if not is_eager() or (type(x) not in TENSORS and are_open(shape)):
            check = self._check_traced if is_tracing() else self._check
            return check(params, _spec(self, x, shape)), False
        accepted: tuple[tuple[Any, Spec], ...] = self.__dict__.get("_accepted", ())
        leaves, structure = optree.tree_flatten(params)
        try:
            facts = [*map(_FACTS, leaves)]
            seen = ((len(shape), *shape[1:], x.dtype, x.device), structure, facts)
        except AttributeError:  # not tensors: the check will refuse them, or the layer
            seen = None
        for known, y in accepted:
            if seen == known:
                return y, False
        y = self._check(params, _spec(self, x, shape))
        # A layer that checks for itself may take numbers for parameters.
        if seen is not None and not any(are_open(sizes) for sizes, *_ in facts):
            # One assignment, so that threads may do this at once.
            self.__dict__["_accepted"] = ((seen, y), *accepted[: _MOST_REMEMBERED - 1])
        return y, True

    def _expect_promised(self, y: Any, promised: Spec, made: Callable[[], Any]) -> None:
        """Raise unless y has the shape that `_out_shape` promises, and x's dtype.

        After an error, the next call checks again. `made` returns the result of `_fwd`.
        """
        expected, is_one = (*promised.batch, *promised.shape), not self._children()
        shape = tuple(y.shape) if isinstance(y, Tensor) else None
        # A combinator passes on what its layers make, if the number of examples is the same.
        fits = shape == expected or (shape and not is_one and shape[:1] == promised.batch)
        # From integers, a layer without parameters may make floats.
        if fits and (y.dtype == promised.dtype or not promised.dtype.is_floating_point):
            return
        self.__dict__.pop("_accepted", None)
        if (is_one or y is None) and not is_pair(result := made()):
            what = f"expected _fwd to return {returned('_fwd')}, got {shown(result)}"
        elif fits:
            what = f"expected y to be {promised.dtype}, got {y.dtype}"
        else:
            got = shown(y) if shape is None else shape
            what = f"expected y of shape {expected}, as out_shape says, got {got}"
        raise broken_promise(self, what, y)

    def _check_traced(self, params: Tree, x: Spec) -> Spec:
        """`_check` inside torch.jit.trace, where sizes are tensors."""
        with warnings.catch_warnings():
            # The graph holds nothing of what is checked here.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            batch, shape = (tuple(map(int, part)) for part in (x.batch, x.shape))
            return self._check(params, x._replace(batch=batch, shape=shape))

    def _as_shape(self, shape: Sequence[int]) -> Shape:
        sizes_of_one = as_shape(self, shape)
        if self._axes is not None and not _has_rank(self._axes, sizes_of_one):
            expected = sizes(self._axes)
            raise ValueError(
                f"{name_of(self)}: expected the shape of one example, {expected}, "
                f"got {sizes_of_one}"
            )
        return sizes_of_one

    def _shape_of_y(self, shape: Shape) -> Shape:
        """`_out_shape` as a tuple. Raises PromiseError unless it is one, or a list."""
        made: Any = self._out_shape(shape)
        if not isinstance(made, (tuple, list)):
            raise broken_promise(
                self, f"expected _out_shape to return a tuple of ints, got {shown(made)}"
            )
        return tuple(made)

    def _check_params(self, params: Tree, x: Spec) -> Any:
        """A tensor or spec with y's dtype and device: a parameter for x of integers, else x."""
        declared = self._params(x.shape)
        if not declared:
            check_no_params(self, params)
            return x
        like = x if x.dtype.is_floating_point else self._like_integers(params, x)
        wrong = misshapen(self, declared, params, like, "params" if like is not x else "x")
        if wrong is None:
            return like
        factors = [v for f in fields(self) if type(v := getattr(self, f.name)) is int]
        fitting = size_that_fits(self._params, params, x.shape, factors)
        if fitting is not None:
            raise self._unfit(x, fitting)
        name, param, got = wrong
        raise ValueError(
            f"{name_of(self)}: expected {name} of shape {sizes(param.shape)}, got {got}"
        )

    def _like_integers(self, params: Tree, x: Spec) -> Any:
        """The first parameter, on x's device, whose dtype y and grad have if x is of integers."""
        like = first_tensor(params, x)
        if like is not x:
            check_tensor(self, "params", like)
        if like.device != x.device:
            raise TypeError(
                f"{name_of(self)}: expected x on the device of params, {like.device}, "
                f"got {x.device}"
            )
        return like

    def _unfit(self, x: Spec, fitting: tuple[int, int] | None = None) -> ValueError:
        """The error that x has a shape that does not fit."""
        letters = list(self._axes or ["*"] * len(x.shape))
        if fitting is not None:
            axis, size = map(int, fitting)  # in a trace, sizes are tensors
            letters[axis if letters[-1] == "…" else axis - len(x.shape)] = str(size)
        return ValueError(
            f"{name_of(self)}: expected x of shape {sizes(('N', *letters))}, "
            f"got {(*x.batch, *x.shape)}"
        )

    def _describe(self) -> str:
        """The layer's name in messages: its code, or a combinator's kind and size."""
        children, kind = self._children(), type(self).__name__
        if not children:
            return repr(self)
        if not children[0][0]:
            return f"{kind}({name_of(children[0][1])})"
        return f"{kind} of {count_of(children)}"

    def _describe_last(self) -> str:
        """The name, in a message about grad, of the layer that made y."""
        return name_of(self)


_MOST_REMEMBERED = 8
_FACTS = attrgetter("shape", "dtype", "device")


def checks_itself(layer: Layer) -> bool:
    """Whether a layer writes `fwd` or `bwd`. Then these are called, and check their arguments."""
    cls = type(layer)
    return cls.fwd is not Layer.fwd or cls.bwd is not Layer.bwd


def writes(layer: Layer, name: str) -> bool:
    """Whether an attribute of a layer holds for its `_fwd` and `_bwd`.

    It does if its class is, or derives from, the classes that define these two: a subclass that
    writes one of them anew has to write the attribute, too.
    """
    look = _is_youngest if torch.compiler.is_compiling() else _remembered_youngest
    return not checks_itself(layer) and look(type(layer), name)


def _is_youngest(cls: type, name: str) -> bool:
    owner, *others = (
        next((base for base in cls.__mro__ if attribute in vars(base)), object)
        for attribute in (name, "_fwd", "_bwd")
    )
    return all(issubclass(owner, other) for other in others)


# Looking takes as long as some layers. torch.compile warns of a cache that it meets.
_remembered_youngest = lru_cache(maxsize=1024)(_is_youngest)


def y_alone(layer: Layer, params: Tree, x: Tensor, key: Key | None) -> Tensor:
    """y by `_apply`, or by `_fwd` where a subclass has written that anew without `_apply`."""
    if type(layer)._apply is Layer._apply or writes(layer, "_apply"):
        return layer._apply(params, x, key)
    return Layer._apply(layer, params, x, key)


def asks(layer: Layer, params: Tree, need: Need) -> bool:
    """Whether a layer has anything to compute in a backward pass."""
    return need.input or (need.params and layer._learns(params))


def same_part(layer: Layer, shape: Shape, part: Part, /) -> tuple[Part, Layer] | None:
    """`_tile` of a layer whose y at a pixel depends on x at that pixel alone."""
    return part, layer


def zeros_like(params: Tree) -> Tree:
    """The gradient of parameters on which nothing depends."""
    return optree.tree_map(torch.zeros_like, params)


def public_bwd(
    layer: Layer, params: Tree, residuals: Any, grad: Tensor, need: Need
) -> tuple[Tree, Tensor | None]:
    """(dparams, dx) by a layer's `bwd`, which may know nothing of `param_grad`."""
    if not need.params and takes_param_grad(layer.bwd):
        made = layer.bwd(params, residuals, grad, input_grad=need.input, param_grad=False)
        return as_pair(layer, "bwd", made)
    made = layer.bwd(params, residuals, grad, input_grad=need.input)
    dparams, dx = as_pair(layer, "bwd", made)
    return dparams if need.params else None, dx


def takes_param_grad(method: Callable[..., Any]) -> bool:
    """Whether a layer's `bwd` or `vjp` has the argument `param_grad`."""
    parameters = signature_of(method).parameters.values()
    return any(p.name == "param_grad" or p.kind is p.VAR_KEYWORD for p in parameters)


def last_bwd(
    layer: Layer, params: Tree, residuals: Any, grad: Tensor, need: Need, y: Spec | None
) -> tuple[Tree, Tensor | None]:
    """(dparams, dx) by a layer's `bwd`, from what its `fwd` has just made and nobody else needs."""
    if not checks_itself(layer):
        return layer._checked_bwd(params, residuals, grad, need._replace(consume=True), y)
    return public_bwd(layer, params, residuals, grad, need)


def like_params(params: Tree, dparams: Tree) -> Tree:
    """dparams in the containers of params: a dict of the same kind, in the same order."""
    structure = structure_of(params)
    try:  # equal structures too: dicts of another order have the same
        return structure.unflatten(structure.flatten_up_to(dparams))
    except (ValueError, TypeError):
        return dparams  # a wrong tree, which is for `check_vjp` to find


def check_net(who: str, net: Any) -> None:
    """Raise TypeError unless net is a Layer."""
    if not isinstance(net, Layer):
        raise TypeError(f"{who}: expected net to be a Layer, got {shown(net)}")


def spec_of_y(y: Any) -> Spec | None:
    """The spec of y; None if it is not a tensor: a layer that checks for itself may return that."""
    if not isinstance(y, Tensor):
        return None
    return Spec(tuple(y.shape[:1]), tuple(y.shape[1:]), y.dtype, y.device)


def _spec(layer: Layer, x: Any, shape: Shape) -> Spec:
    if not isinstance(x, Tensor):
        check_tensor(layer, "x", x)
    return Spec(tuple(shape[:1]), tuple(shape[1:]), x.dtype, x.device)


def _layer_fields(layer: Layer) -> list[tuple[str, Any]]:
    """(name, value) of each field that is a layer, or a tuple of layers."""
    found = [(field.name, getattr(layer, field.name)) for field in fields(layer) if field.init]
    return [(name, value) for name, value in found if _holds_layers(value)]


def _holds_layers(value: Any) -> bool:
    values = _as_tuple(value)
    return bool(values) and all(isinstance(each, Layer) for each in values)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _has_rank(axes: str, shape: Shape) -> bool:
    return len(shape) >= len(axes) - 1 if "…" in axes else len(shape) == len(axes)
