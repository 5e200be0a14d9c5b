"""A function of tensors as a case: autograd's gradients of it are what is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcnet.compat import gradient_hooks, version
from funcnet.interop.wrap import call_within
from funcnet.testing.check.case import (
    Case,
    Leaves,
    expect_real_and_dense,
    named_leaves,
    signed,
    tried,
    unlike,
)
from funcnet.testing.check.oracles import is_handwritten
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.layouts import copied


@dataclass(frozen=True, kw_only=True)
class FunctionCase(Case):
    """A function of tensors as a layer: y holds the entries of all differentiable outputs.

    `layer(params, x)` returns the outputs. params holds a module's parameters by name, or nothing;
    x the tensors among the inputs, and `arguments` puts these among the others. `function` is what
    the user gave, `pristine` a copy that nobody has called, if it is a module that can be copied.
    """

    function: Any
    pristine: Any
    arguments: Callable[[Any], Any]
    by_reference: Callable[[Any, Any], Any] | None
    chosen: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def names(self) -> list[str]:
        return [*named_leaves(parameters=self.params, inputs=self.x)]

    @property
    def output_names(self) -> list[str]:
        return [f"output {i}" for i in self.chosen]

    @property
    def batch(self) -> None:
        return None

    @property
    def is_autograds(self) -> bool:
        there = self.with_leaves(lambda x: x.clone().requires_grad_(x.is_floating_point()))
        with torch.enable_grad():
            return not is_handwritten(joined(there.outputs()))

    def outputs(self) -> list[Tensor]:
        """The differentiable outputs."""
        found = optree.tree_leaves(self.layer(self.params, self.x))
        return [found[i] for i in self.chosen]

    def _apply(self) -> Tensor:
        with torch.no_grad():
            return joined(self.outputs())

    def _reference(self) -> Tensor:
        if self.by_reference is None:
            return self._apply()  # which autograd cannot follow
        found = dict(enumerate(optree.tree_leaves(self.by_reference(self.params, self.x))))
        outputs: list[Any] = [found.get(i) for i in self.chosen]
        shapes = [y.shape if isinstance(y, Tensor) else None for y in outputs]
        if tuple(shapes) != self.shapes:
            raise ValueError(
                "check_function: expected reference to return what the function does, tensors of "
                f"shapes {_tuples(self.shapes)}, got {_tuples(shapes)}"
            )
        return joined(outputs)

    def fwd(self) -> tuple[Tensor, tuple[()]]:
        return self.apply(), ()

    def bwd(self, residuals: Any, **need: bool) -> Any:
        return self.vjp()

    def vjp(self, **need: bool) -> Any:
        gradients = self.gradients_by(self.grads)
        first = self.first_of_x
        of_params, of_x = optree.tree_structure(self.params), optree.tree_structure(self.x)
        return of_params.unflatten(gradients[:first]), of_x.unflatten(gradients[first:])

    @property
    def grads(self) -> list[Tensor]:
        """The gradient of each output."""
        return self.parts_of(self.grad)

    def gradients_by(
        self, grads: Sequence[Tensor | None], which: Sequence[int] | None = None
    ) -> Leaves:
        """The gradients of the leaves, or of some, which alone require one; zeros for the others.

        An output whose grad is None is not used.
        """
        return self.run_forward(which)(grads)

    def run_forward(self, which: Sequence[int] | None = None) -> Callable[..., Leaves]:
        """Run the forward pass. Returns the backward pass as a function of grads.

        It can be run again if `retain` is True.
        """
        leaves = [leaf.detach() for leaf in self.leaves]
        which = range(len(leaves)) if which is None else which
        asked = [i for i in which if leaves[i].is_floating_point()]
        for i in asked:
            leaves[i] = copied(leaves[i]).requires_grad_()
        there = self.at(leaves)
        _hook(self.function, there.params)
        versions = [version(leaf) for leaf in leaves]
        with torch.enable_grad():
            y = there.outputs()

        def backward(grads: Sequence[Tensor | None], retain: bool = False) -> Leaves:
            found: dict[int, Tensor | None] = {}
            pairs = zip(y, grads, strict=True)
            used = [(y, g.to(y)) for y, g in pairs if g is not None and y.requires_grad]
            if used and asked:
                outputs, parts = zip(*used, strict=True)
                inputs = [leaves[i] for i in asked]
                # A backward pass may run parts of the forward pass again.
                by = within_module(
                    self.function, there.params, there.x,
                    lambda: torch.autograd.grad(
                        outputs, inputs, parts, retain_graph=retain, allow_unused=True
                    ),
                )  # fmt: skip
                found = dict(zip(asked, by, strict=True))
            for name, leaf, before in zip(self.names, leaves, versions, strict=True):
                if version(leaf) != before:
                    raise GradientMismatch(f"writes to {name}, a tensor that it was handed")
            return [
                torch.zeros_like(leaf, dtype=self.dtype)
                if (gradient := found.get(i)) is None
                else _dense(gradient)
                for i, leaf in enumerate(leaves)
            ]

        return backward

    def parts_of(self, y: Tensor) -> list[Tensor]:
        """The outputs whose entries y holds, or their gradients."""
        parts = torch.split(y, [shape.numel() for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def make_case(
    function: Any, inputs: Sequence[Any], reference: Callable[..., Any] | None, grad: Any
) -> FunctionCase:
    given: Any = tuple(inputs)
    leaves, structure = optree.tree_flatten(given)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    params: Any = {}
    if isinstance(function, nn.Module):
        params = {name: p.detach() for name, p in function.named_parameters()}
    for leaf in [*params.values(), *(leaves[i] for i in tensors)]:
        expect_real_and_dense("check_function: expected inputs", leaf)

    def arguments(x: Any) -> Any:
        """All inputs, with other tensors."""
        new = list(leaves)
        for i, tensor in zip(tensors, x, strict=True):
            new[i] = tensor
        return structure.unflatten(new)

    call = partial(call_with, function, arguments)
    pristine = tried(partial(copy.deepcopy, function)) if isinstance(function, nn.Module) else None
    x = tuple(leaves[i].detach() for i in tensors)
    floats = [leaf for leaf in (*x, *params.values()) if leaf.is_floating_point()]
    if not floats:
        raise TypeError("check_function: expected a floating-point tensor among the inputs")
    elsewhere = copy.deepcopy(pristine) if isinstance(function, nn.Module) else function
    tried(partial(_first_call, partial(call_with, elsewhere, arguments), params, x))
    tracked = [leaf.clone().requires_grad_(leaf.is_floating_point()) for leaf in x]
    with torch.enable_grad():
        followed = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
        # Of copies: autograd lets nobody write to a leaf, and what does so has to show later.
        outputs = optree.tree_leaves(call(followed, tuple(leaf.clone() for leaf in tracked)))
    chosen = _differentiable(name_of(function), outputs)
    shapes = tuple(outputs[i].shape for i in chosen)
    all_grads = joined(_grads(grad, shapes)).to(floats[0])
    return FunctionCase(
        call, params, x, all_grads,
        function=function, pristine=pristine, arguments=arguments,
        by_reference=reference and partial(_refer, reference, arguments),
        chosen=chosen, shapes=shapes,
    )  # fmt: skip


def _first_call(call: Callable[[Any, Any], Any], params: Any, x: Any) -> None:
    """Run both passes at other numbers: what is kept from the first call must not serve."""

    def moved(leaf: Tensor) -> Tensor:
        return unlike(leaf).requires_grad_(leaf.is_floating_point())

    params, x = (optree.tree_map(moved, tree) for tree in (params, x))
    with torch.enable_grad():
        outputs = optree.tree_leaves(call(params, x))
    y = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    leaves = [leaf for leaf in (*x, *params.values()) if leaf.requires_grad]
    torch.autograd.grad(y, leaves, [torch.ones_like(part) for part in y], allow_unused=True)


def call_with(function: Any, arguments: Callable[[Any], Any], params: Any, x: Any) -> Any:
    return within_module(function, params, x, lambda: _callable(function)(*arguments(x)))


def _refer(
    reference: Callable[..., Any], arguments: Callable[[Any], Any], params: Any, x: Any
) -> Any:
    return reference(*arguments(x), **params)


def within_module(function: Any, params: Any, x: Any, call: Callable[[], Any]) -> Any:
    """Return `call()`; a module has these parameters meanwhile, and buffers of their dtype."""
    if not isinstance(function, nn.Module):
        return call()
    like = next(leaf for leaf in (*x, *params.values()) if leaf.is_floating_point())
    own = {  # copies: the module may write to them
        name: buffer.clone().to(like.dtype if buffer.is_floating_point() else buffer.dtype)
        for name, buffer in function.named_buffers()
    }
    return call_within(function, {**own, **params}, call, tie_weights=True)


def _hook(function: Any, params: Any) -> None:
    """Let the gradients of these parameters pass the hooks that a module's own have."""
    own = dict(function.named_parameters()) if params else {}
    for name, leaf in params.items():
        for hook in (gradient_hooks(own[name]) or {}).values() if leaf.requires_grad else ():
            leaf.register_hook(hook)


def _differentiable(name: str, outputs: Sequence[Any]) -> tuple[int, ...]:
    """The positions of the outputs that have a gradient. Raises where none has one."""
    chosen = [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if not chosen:
        raise GradientMismatch(f"{name}: expected an output that has a gradient")
    for i in chosen:
        if outputs[i].is_complex():
            raise TypeError(
                f"check_function: expected outputs of real numbers, got {outputs[i].dtype}: "
                "return y.real and y.imag"
            )
        if outputs[i].layout != torch.strided:
            raise TypeError(
                "check_function: expected outputs of dense tensors, got "
                f"{outputs[i].layout}: return y.to_dense()"
            )
    return tuple(chosen)


def _grads(grad: Any, shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """The gradient of each output: drawn with both signs, or the one given, if it fits."""
    if grad is None:
        return [signed(shape, 1 + i) for i, shape in enumerate(shapes)]
    parts = [torch.as_tensor(part).detach() for part in optree.tree_leaves(grad)]
    for part in parts:
        expect_real_and_dense("check_function: expected gradients", part)
    if tuple(part.shape for part in parts) != shapes:
        raise ValueError(
            f"check_function: expected grad of the outputs' shapes, {_tuples(shapes)}, "
            f"got {_tuples(part.shape for part in parts)}"
        )
    return parts


def _dense(gradient: Tensor) -> Tensor:
    """A dense gradient without its graph: the gradient of an embedding may be sparse."""
    gradient = gradient.detach()
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def joined(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([y.reshape(-1) for y in outputs])


def _tuples(shapes: Iterable[Sequence[int] | None]) -> list[tuple[int, ...] | None]:
    return [None if shape is None else tuple(shape) for shape in shapes]


def _callable(function: Any) -> Callable[..., Any]:
    is_class = isinstance(function, type) and issubclass(function, torch.autograd.Function)
    return function.apply if is_class else function  # type: ignore[no-any-return]


def name_of(function: Any) -> str:
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__
