"""A torch.nn.Module as a layer, whose gradient is autograd's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import getitem
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcnet.checks import as_shape
from funcnet.compat import storage_id
from funcnet.initializers import Device, Initializer
from funcnet.interop.observation import Traits, observe, shape_of_one, tensor_like
from funcnet.keys import Key, key
from funcnet.layer import Layer, Shape, Spec, Tree
from funcnet.ops.inplace import in_layout_of, is_eager, is_untracked
from funcnet.ops.need import Need
from funcnet.param import Param

_Result = TypeVar("_Result")


def wrap(module: nn.Module, shape: Sequence[int]) -> tuple[Layer, Tree]:
    """Return (layer, params): a torch.nn.Module as a layer for examples of `shape`.

    y = module(x) with x (N, *shape), and the gradient is autograd's, by torch.func.functional_call.
    The layer holds a deep copy of the module, in the mode it is in: later changes to the module do
    not reach it. Parameters are copies, in dicts nested by PyTorch's names, whether or not they
    require gradients (see `Frozen`); buffers are constants of the layer, and follow its params'
    dtype and device. The layer's `init` returns the module's own values, whatever the key. Layers
    are equal if they hold the same copy. A file cannot hold one. Under torch.func.vmap it works as
    far as PyTorch's kernels do: those of torch.nn.LSTM do not. One thread at a time may use it.

    The module runs a few times on random numbers, with random parameters, too. Its y must follow
    from params and x alone. A module in it that changes its buffers, as BatchNorm does in train
    mode, or draws numbers, as Dropout does, is refused by name, since keys decide nothing there.
    Call `module.eval()`, or use `BatchNorm` and `Dropout` of this package in its place. A module
    that writes to its parameters is refused, too. One that calls `x.view`, which needs a contiguous
    x, gets one.

    Raises ValueError for such modules, for those that cannot be copied, that do not take such
    examples or that fail in their backward pass, and for parameters that cannot be handed over:
    complex ones, of several dtypes, on meta, those of TorchScript and DataParallel. Raises it, too,
    unless y is one tensor (N, …) with the dtype of x and the parameters. Raises TypeError unless
    `module` is a torch.nn.Module.

    >>> import funcnet as fn
    >>> from torch import nn
    >>> encoder = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
    >>> layer, params = fn.interop.wrap(encoder, (5, 8))
    >>> layer
    Wrapped(TransformerEncoderLayer, vjp from autograd)
    >>> net = fn.Sequential(layer, fn.Select(1, -1), fn.Linear(3))
    >>> params = net.init(fn.key(0), (5, 8))
    >>> net.apply(params, fn.normal(fn.key(1), (2, 5, 8))).shape
    torch.Size([2, 3])
    >>> fn.interop.wrap(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), (3,))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: wrap: expected a module that draws no numbers, got 1 (Dropout, train mode): ...
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"wrap: expected module to be a torch.nn.Module, got {type(module).__name__}"
        )
    _check_parts(module)
    with torch.inference_mode(False):  # autograd is to run, and to count what is written to
        try:
            own, like = copy.deepcopy(module), tensor_like(module)
        except Exception as error:  # a module may raise anything
            raise ValueError(
                f"wrap: expected a module that can be copied, got {type(module).__name__}: {error}"
            ) from error
        layer = Wrapped(own, observe(own, as_shape("wrap", shape)))
        return layer, layer.init(key(0), shape, dtype=like.dtype, device=like.device)


def _check_parts(module: nn.Module) -> None:
    """Raise ValueError for modules and parameters that cannot be replaced by others."""
    wrong = [
        f"{name or 'the module itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, (torch.jit.ScriptModule, nn.DataParallel))
    ]
    if wrong:
        raise ValueError(f"wrap: expected a plain torch.nn.Module, got {', '.join(wrong)}")
    wrong = [f"{name} ({p.dtype})" for name, p in module.named_parameters() if p.is_complex()]
    if wrong:
        raise ValueError(f"wrap: expected real parameters, got {', '.join(wrong)}")
    tensors = (*module.named_parameters(), *module.named_buffers())
    wrong = [name for name, tensor in tensors if tensor.is_meta]
    if wrong:
        raise ValueError(f"wrap: expected tensors with values, got {', '.join(wrong)} on meta")
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            dtypes.setdefault(parameter.dtype, f"{name} ({parameter.dtype})")
    if len(dtypes) > 1:
        raise ValueError(
            f"wrap: expected parameters of one dtype, got {', '.join(dtypes.values())}"
        )


@dataclass(frozen=True)
class Wrapped(Layer):
    """The layer that `wrap` makes."""

    module: nn.Module
    traits: Traits
    _paths: dict[str, list[str]] = field(init=False, repr=False, compare=False)
    """The keys that lead to each parameter, by its name in each module that has it."""

    _unstorable = "a torch.nn.Module is code, which a file does not hold; save params alone"

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = {id(p): name.split(".") for name, p in self._own_parameters()}
        places = places_of(self.module, nn.Module.named_parameters)
        paths = {name: keys[id(p)] for name, p in places if id(p) in keys}
        object.__setattr__(self, "_paths", paths)

    def __repr__(self) -> str:
        return f"Wrapped({type(self.module).__name__}, vjp from autograd)"

    @property
    def couples_examples(self) -> Any:  # type: ignore[override]
        """Whether y of an example was seen to depend on another."""
        return self.traits.couples_examples

    def _own_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.is_floating_point())

    def _params(self, shape: Shape) -> dict[str, Any]:
        declared: dict[str, Any] = {}
        for name, parameter in self._own_parameters():
            *parents, last = name.split(".")
            place = reduce(lambda place, step: place.setdefault(step, {}), parents, declared)
            place[last] = Param(tuple(parameter.shape), _AsItIs(parameter))
        return declared

    def _out_shape(self, shape: Shape) -> Shape:
        if shape == self.traits.shape:
            return self.traits.out_shape
        dtype = torch.int64 if self.traits.takes_integers else tensor_like(self.module).dtype
        x = torch.empty((2, *shape), dtype=dtype, device="meta")
        kinds = (nn.Module.named_parameters, nn.Module.named_buffers)
        tensors = {n: t.to("meta") for kind in kinds for n, t in places_of(self.module, kind)}
        try:
            with torch.no_grad():
                y = functional_call(self.module, tensors, (x,), tie_weights=False)
        except Exception as error:  # a module may raise anything
            raise ValueError(
                f"{self}: expected the shape of an example that it takes, got {shape}: {error}"
            ) from error
        return shape_of_one(str(self), y, len(x))

    def _check_x(self, x: Spec) -> None:
        if not self.traits.takes_integers:
            super()._check_x(x)
        elif x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{self}: expected x to be int32 or int64, got {x.dtype}")

    def _apply(self, params: Any, x: Tensor, key: Key | None) -> Tensor:
        return self._unshared(self._called(self.tensors(params, x), x), params, x)

    def _fwd(self, params: Any, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        leaves, structure = optree.tree_flatten(params)
        if not is_untracked(x, *leaves):  # derivatives do not pass through a graph made here
            return self._apply(params, x, key), x
        with torch.inference_mode(False), torch.enable_grad():
            starts = [_start(tensor) for tensor in (*leaves, x)]
            tensors = self.tensors(structure.unflatten(starts[:-1]), starts[-1])
            y = self._called(tensors, starts[-1])
        return self._unshared(y.detach(), params, x), _Graph(starts, y, self.module, tensors)

    def _bwd(self, params: Any, residuals: Any, dy: Tensor, need: Need) -> Any:
        if isinstance(residuals, Tensor):
            return self._recomputed(params, residuals, dy, need)
        *leaves, x = residuals.starts
        if not is_untracked(dy, *optree.tree_leaves(params)):
            return self._recomputed(params, x.detach(), dy, need)
        wanted = [*(leaves if need.params else []), *([x] if need.input else [])]
        found = [_unshared(d, [dy]) for d in residuals.gradients(wanted, dy, need)]
        dx = found.pop() if need.input else None
        return optree.tree_structure(params).unflatten(found) if need.params else None, dx

    def _recomputed(self, params: Any, x: Tensor, dy: Tensor, need: Need) -> Any:
        """(dparams, dx) by torch.func, which differentiates inside of its own transformations."""
        starts = (params, x) if need.input else (params,)
        made: Any = torch.func.vjp(lambda p, x=x: self._apply(p, x, None), *starts)
        y, back = made
        found = back(_laid_out(dy, y))
        return found if need.input else (*found, None)

    def _called(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """The module's y, which may share memory with its tensors and x."""
        given = x.contiguous() if self.traits.needs_row_major else x
        given = given.clone() if self.traits.writes_x else given
        y: Tensor = functional_call(self.module, tensors, (given,), tie_weights=False)
        return y

    def tensors(self, params: Any, x: Tensor) -> dict[str, Tensor]:
        """Return the tensors for the module to compute with, tied parameters under each name.

        functional_call ties them itself, but where one module is in two places it would leave them
        in the module.
        """
        tensors = {n: _row_major(reduce(getitem, keys, params)) for n, keys in self._paths.items()}
        like, home = next(iter(tensors.values()), x), tensor_like(self.module)
        if (like.dtype, like.device) == (home.dtype, home.device):
            return tensors
        for name, buffer in places_of(self.module, nn.Module.named_buffers):
            dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
            tensors[name] = buffer.to(like.device, dtype)
        return tensors

    def _unshared(self, y: Tensor, params: Any, x: Tensor) -> Tensor:
        return _unshared(y, [x, *optree.tree_leaves(params), *self.module.buffers()])


@dataclass(frozen=True, eq=False)
class _Graph:
    """Autograd's graph from its starts, copies of params and x, to y.

    A module has made it from `tensors`, by their names in it.
    """

    starts: list[Tensor]
    y: Tensor
    module: nn.Module
    tensors: dict[str, Tensor]

    def gradients(self, wanted: list[Tensor], dy: Tensor, need: Need) -> Sequence[Tensor]:
        """Return the gradients of Σ dy ∘ y with respect to some of the starts."""
        if not self.y.requires_grad:
            return [torch.zeros_like(start) for start in wanted]
        run = partial(
            torch.autograd.grad,
            self.y,
            wanted,
            _laid_out(dy, self.y),
            retain_graph=not need.consume,
            allow_unused=True,
            materialize_grads=True,
        )
        # The backward pass may run the module again, as torch.utils.checkpoint does.
        return call_within(self.module, self.tensors, run, tie_weights=False)


def call_within(
    module: nn.Module, tensors: dict[str, Tensor], call: Callable[[], _Result], tie_weights: bool
) -> _Result:
    """Return `call()`, during which the module has other tensors, by their names in it."""
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    found: _Result = functional_call(_Caller(module), named, (call,), tie_weights=tie_weights)
    return found


class _Caller(nn.Module):
    """Calls what it is given: functional_call puts tensors in for a forward pass alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def places_of(
    module: nn.Module, kind: Callable[..., Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters or buffers that each module has, (name, tensor), each module once."""
    for prefix, part in module.named_modules():
        yield from kind(part, prefix, recurse=False, remove_duplicate=False)


@dataclass(frozen=True, eq=False)
class _AsItIs(Initializer):
    """Returns a copy of a tensor, whatever the key."""

    value: Tensor

    def _draw(self, key: Key, shape: Shape, dtype: torch.dtype, device: Device) -> Tensor:
        return self.value.detach().to(device, dtype, copy=True)


def _start(tensor: Tensor) -> Tensor:
    """A tensor of the same values from which autograd starts."""
    start = tensor.clone() if tensor.is_inference() else tensor.detach()
    return start.requires_grad_(start.is_floating_point())


def _row_major(parameter: Tensor) -> Tensor:
    """A vector without gaps: with gaps, PyTorch's batch_norm computes a wrong gradient."""
    return parameter.contiguous() if parameter.ndim == 1 else parameter


def _laid_out(dy: Tensor, y: Tensor) -> Tensor:
    """dy in y's memory layout: PyTorch's instance_norm differentiates wrongly in another."""
    return dy if dy.stride() == y.stride() else in_layout_of(y, dy)


def _unshared(result: Tensor, others: Iterable[Tensor]) -> Tensor:
    """A result in memory of its own: a module may return a view of x, and autograd dy itself."""
    if not is_eager():
        return result.clone()
    memory = storage_id(result.untyped_storage())
    is_shared = any(storage_id(other.untyped_storage()) == memory for other in others)
    return result.clone() if is_shared else result
