"""The private names of torch that funcnet uses, and the public fallback of each.

Any release of torch may drop a private name. Each is looked up here, once, when funcnet is
imported. If it is gone, the public fallback beside it is used, which gives the same numbers up to
rounding but may be slower. Where there is none, the name is None, and the module that uses it has
formulas of its own.

Private is a name with an underscore, and `mkldnn_rnn_layer`. Kernels of ATen without an underscore,
like `torch.ops.aten.convolution_backward` or `torch.ops.aten.elu_backward`, are used where they are
needed: torch's own autograd calls them on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcnet.ops.accumulation import widened


def named(path: str, fallback: Any = None, of: Any = torch) -> Any:
    """Return torch's object with a dotted name, or the fallback if there is none.

    >>> named("nn.Linear") is torch.nn.Linear
    True
    >>> named("_dropped.relu", torch.relu) is torch.relu
    True
    """
    found = of
    for name in path.split("."):
        found = getattr(found, name, None)
    return fallback if found is None else found


def _together(*paths: str) -> Sequence[Any]:
    """Return objects of which each needs the others: all of them, or None for each."""
    found = [named(path) for path in paths]
    return [None] * len(found) if None in found else found


def _attributes(*names: str, of: Any, fallback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that reads these attributes, or the fallback if `of` lacks one."""
    return fallback if None in [named(name, of=of) for name in names] else attrgetter(*names)


# --- Gradients of softmax along an axis


def _softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx = y ∘ (dy − Σ y ∘ dy)."""
    dy, y = widened(dy), widened(y)
    return (y * (dy - (y * dy).sum(dim, keepdim=True))).to(dtype)


def _log_softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx = dy − exp(y) · Σ dy."""
    dy, y = widened(dy), widened(y)
    return (dy - y.exp() * dy.sum(dim, keepdim=True)).to(dtype)


softmax_backward: Callable[..., Tensor] = named(
    "ops.aten._softmax_backward_data.default", _softmax_backward
)
log_softmax_backward: Callable[..., Tensor] = named(
    "ops.aten._log_softmax_backward_data.default", _log_softmax_backward
)


# --- PReLU, with a weight that broadcasts to x


def plain_prelu(x: Tensor, weight: Tensor) -> Tensor:
    """y = x where x > 0, else weight ∘ x."""
    return torch.where(x > 0, x, weight * x)


def plain_prelu_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, the terms of dweight): dy and 0 where x > 0, else weight ∘ dy and x ∘ dy."""
    return torch.where(x > 0, dy, weight * dy), torch.where(x > 0, 0.0, x * dy)


prelu: Callable[..., Tensor] = named("ops.aten._prelu_kernel.default", plain_prelu)
prelu_backward: Callable[..., tuple[Tensor, Tensor]] = named(
    "ops.aten._prelu_kernel_backward.default", plain_prelu_backward
)


# --- Adaptive average pooling of images and volumes


def _adaptive_average_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Along each axis dx = Aᵀ·dy, where row i of A is 1/n at the n entries of window i."""
    dx = widened(dy)
    for axis in range(2, dy.ndim):
        before, after = x.shape[axis], dy.shape[axis]
        means = dx.new_zeros(after, before)
        for i in range(after):
            start, stop = i * before // after, -(-(i + 1) * before // after)
            means[i, start:stop] = 1 / (stop - start)
        dx = (dx.transpose(axis, -1) @ means).transpose(axis, -1)
    return dx.to(dy.dtype)


adaptive_average: Mapping[int, Callable[..., Tensor]] = {
    4: named("ops.aten._adaptive_avg_pool2d.default", F.adaptive_avg_pool2d),
    5: named("ops.aten._adaptive_avg_pool3d.default", F.adaptive_avg_pool3d),
}
"""By the number of x's axes."""

adaptive_average_backward: Mapping[int, Callable[..., Tensor]] = {
    4: named("ops.aten._adaptive_avg_pool2d_backward.default", _adaptive_average_backward),
    5: named("ops.aten._adaptive_avg_pool3d_backward.default", _adaptive_average_backward),
}


# --- Kernels for a whole layer or step. `ops.attention`, `ops.recurrent` and `optimizers.adam` have
# the formulas.

flash_attention, flash_attention_backward = _together(
    "ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
    "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
)
mkldnn_rnn, mkldnn_rnn_backward = _together(
    "ops.aten.mkldnn_rnn_layer.default", "ops.aten.mkldnn_rnn_layer_backward.default"
)
fused_adam, fused_adamw = _together("_fused_adam_", "_fused_adamw_")


is_mkldnn_enabled: Callable[[], bool] = named(
    "_C._get_mkldnn_enabled", lambda: bool(torch.backends.mkldnn.enabled)
)


# --- One operation on every tensor of a list


def in_turn(name: str, xs: list[Tensor], *others: Any, **numbers: float) -> list[Tensor]:
    """Apply torch.Tensor's operation of that name to each x. Other operands are lists or numbers.

    >>> in_turn("add", [torch.tensor(1), torch.tensor(2)], [torch.tensor(3), torch.tensor(4)])
    [tensor(4), tensor(6)]
    """
    operation = getattr(Tensor, name)
    columns = [other if isinstance(other, list) else [other] * len(xs) for other in others]
    return [operation(*row, **numbers) for row in zip(xs, *columns, strict=True)]


def _write_in_turn(name: str, xs: list[Tensor], *others: Any, **numbers: float) -> None:
    results = in_turn(name, xs, *others, **numbers)
    for x, result in zip(xs, results, strict=True):
        x.copy_(result)


def norms_in_turn(xs: list[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    return [torch.linalg.vector_norm(x, order, dtype=dtype) for x in xs]


_OPERATIONS = ("add", "addcdiv", "addcmul", "div", "lerp", "maximum", "mul", "neg", "sqrt", "sub")

foreach = {name: named(f"_foreach_{name}", partial(in_turn, name)) for name in _OPERATIONS}
foreach_ = {name: named(f"_foreach_{name}_", partial(_write_in_turn, name)) for name in _OPERATIONS}
"""The same, written into the first list."""

foreach_norm: Callable[..., Sequence[Tensor]] = named("_foreach_norm", norms_in_turn)


# --- torch.func's transformations


class _Untransformed(torch.autograd.Function):
    """A function that torch.func refuses to transform, since it has no setup_context."""

    @staticmethod
    def forward(ctx: Any) -> None:
        pass


def _innermost() -> bool | None:
    """Return True under a transformation, else None."""
    try:
        _Untransformed.apply()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return None


def _has_no_memory(x: Tensor) -> bool:
    """Whether a dense tensor has no memory of its own, as inside a transformation."""
    if x.layout != torch.strided:
        return False
    try:
        x.untyped_storage().data_ptr()
    except RuntimeError:
        return True
    return False


def _dual_level(forward_ad: Any) -> int:
    """Return 0 where dual tensors can be made, else -1."""
    number = torch.zeros((), device="cpu")
    try:
        forward_ad.make_dual(number, number)
    except RuntimeError:
        return -1
    return 0


is_jit_tracing: Callable[[], bool] = named("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Returns whether torch.jit.trace records."""

innermost_transformation: Callable[[], Any] = named(
    "_C._functorch.peek_interpreter_stack", _innermost
)
"""Returns the innermost transformation that is running, or None."""

_transformations, _kinds = _together(
    "_C._functorch.get_interpreter_stack", "_C._functorch.TransformType"
)


def none_but_vmap() -> bool:
    """Whether no transformation is running, or torch.func.vmap alone; False if nobody can tell."""
    if _transformations is None:
        return innermost_transformation() is None
    return all(transformation.key() == _kinds.Vmap for transformation in _transformations() or ())


dispatch_modes: Callable[[], Sequence[Any]] = named(
    "utils._python_dispatch._get_current_dispatch_mode_stack", list
)
"""Returns the modes that see every operation of this thread."""

dual_level: Callable[[Any], int] = _attributes(
    "_current_level", of=torch.autograd.forward_ad, fallback=_dual_level
)
"""Takes torch.autograd.forward_ad and returns its current level; below 0 where there is none."""

is_transformed: Callable[[Tensor], bool] = named(
    "_C._functorch.is_functorch_wrapped_tensor", _has_no_memory
)


# --- torch.autograd.grad(is_grads_batched=True), which batches by other means than torch.func

_is_batched, _batched, _unbatched, _enter_level, _leave_level = _together(
    "_C._functorch.is_legacy_batchedtensor",
    "_add_batch_dim",
    "_remove_batch_dim",
    "_C._vmapmode_increment_nesting",
    "_C._vmapmode_decrement_nesting",
)


def over_batched(
    function: Callable[[Tensor], tuple[Tensor, ...]], grad: Tensor
) -> Sequence[Tensor]:
    """function(grad), by torch.func.vmap if autograd has hidden an axis of grad.

    Without the private names a kernel that autograd cannot batch raises torch's own error.
    """
    if _is_batched is None or not _is_batched(grad):
        return function(grad)
    level = _enter_level() - 1
    _leave_level()
    results = torch.func.vmap(function)(_unbatched(grad, level, 0, 0))
    return [_batched(result, 0, level) for result in results]


# --- Writes to a tensor, and its place in memory


def _digest(x: Tensor) -> int:
    """A hash of x's values: it misses a write of equal ones."""
    values = x.resolve_conj().resolve_neg().cpu().contiguous().flatten()
    return hash(values.view(torch.uint8).numpy().tobytes())


version: Callable[[Tensor], int] = _attributes("_version", of=Tensor, fallback=_digest)
"""Returns another number after a write to x."""

storage_id: Callable[[torch.UntypedStorage], int] = _attributes(
    "_cdata", of=torch.UntypedStorage, fallback=id
)
"""Returns the same number for the storages of tensors that share memory, while these live."""


def _gradient_hooks(x: Tensor) -> Mapping[int, Any]:
    return _registered(x.register_hook)[0] if x.requires_grad else {}


gradient_hooks: Callable[[Tensor], Mapping[int, Any] | None] = _attributes(
    "_backward_hooks", of=Tensor, fallback=_gradient_hooks
)
"""Returns the hooks that a tensor's gradient passes; None, too, where it has none."""


# --- torch.nn.Module


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """The children by name; `named_children` would leave out the second of two equal ones."""
    below = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in below if name and "." not in name}


def _forward_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return _registered(module.register_forward_hook, module.register_forward_pre_hook)


def _hooks_of_all_modules() -> tuple[Mapping[int, Any], ...]:
    return _registered(
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    )


def _registered(*registers: Callable[..., Any]) -> tuple[Mapping[int, Any], ...]:
    handles = [register(lambda *_: None) for register in registers]
    for handle in handles:
        handle.remove()
    return tuple(handle.hooks_dict_ref() or {} for handle in handles)


children: Callable[[nn.Module], Mapping[str, Any]] = _attributes(
    "_modules", of=nn.Module(), fallback=_children
)

forward_hooks: Callable[[nn.Module], tuple[Mapping[int, Any], ...]] = _attributes(
    "_forward_hooks", "_forward_pre_hooks", of=nn.Module(), fallback=_forward_hooks
)

_hooks, _pre_hooks = _together(
    "nn.modules.module._global_forward_hooks", "nn.modules.module._global_forward_pre_hooks"
)

hooks_of_all_modules: Callable[[], tuple[Mapping[int, Any], ...]] = (
    _hooks_of_all_modules if _hooks is None else lambda: (_hooks, _pre_hooks)
)
"""Returns the forward hooks that every module runs."""


# --- Watching operations, and trees


TorchDispatchMode: Any = named("utils._python_dispatch.TorchDispatchMode", nullcontext)
"""Without it, `testing.check.rounding` nudges inputs and residuals alone."""


def _returns_old_memory(operator: Any) -> bool:
    return any(returned.alias_info is not None for returned in operator._schema.returns)


returns_old_memory: Callable[[Any], bool] = (
    _returns_old_memory if named("ops.aten.add.Tensor._schema") else lambda operator: True
)
"""Whether what an operator returns may be a view, or memory that it was handed."""


register_pytree_node: Callable[..., None] = named(
    "utils._pytree.register_pytree_node", lambda *of_class: None
)
"""Without it, torch's functions on trees take the instances of a class for leaves."""
