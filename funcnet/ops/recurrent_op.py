"""One direction of a recurrent layer as one operation of torch.compile, for any number of steps.

torch.compile unrolls a loop: each number of steps would need a graph of its own, and a second of
compilation for each step. The operation runs the cell as it runs eagerly. Import this only while
torch compiles: it is of no use elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.compiling import constant
from funcnet.ops import recurrent
from funcnet.ops.need import Need
from funcnet.ops.recurrent import Cell, Run, Weights, Workspace

_CELLS = {c.name: c for c in (recurrent.TANH, recurrent.RELU, recurrent.LSTM(), recurrent.GRU())}


def forward(cell: Cell, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
    """`cell.forward`."""
    kernel = cell.has_kernel(x) and constant(recurrent.kernel_is_there)
    h, *kept = _forward(cell.name, kernel, x, _there(weights), reverse, keep)
    return h, Workspace(*kept) if kernel and keep else kept


def backward(
    cell: Cell, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need
) -> tuple[Weights | None, Tensor | None]:
    """`cell.backward`."""
    given = _there(weights)
    if isinstance(run.kept, Workspace):
        entries, last_c = run.kept
        if not need.consume:
            entries = entries.clone()
        dx, *grads = _kernel_backward(run.x, run.h, entries, last_c, dh, given, reverse)
        dweights = Weights(*grads[: len(given)]) if need.params else None
        return dweights, dx if need.input else None
    grads = _backward(cell.name, run.x, run.h, run.kept, dh, given, reverse, *need[:2])
    dweights = Weights(*grads[: len(given)]) if need.params else None
    return dweights, grads[-1] if need.input else None


@torch.library.custom_op("funcnet::recurrent", mutates_args=())
def _forward(
    cell: str, kernel: bool, x: Tensor, weights: Sequence[Tensor], reverse: bool, keep: bool
) -> list[Tensor]:
    run = recurrent.kernel_forward if kernel else _CELLS[cell].steps
    with torch.no_grad():
        h, kept = run(x, Weights(*weights), reverse, keep)
    return [h.contiguous(), *kept]


@_forward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    cell, kernel, x, weights, _, keep = arguments
    steps, examples, _ = x.shape
    h = x.new_empty(steps, examples, weights[1].shape[1])
    if kernel and keep:
        size = torch.library.get_ctx().new_dynamic_size()
        return [h, x.new_empty(size, dtype=torch.uint8), torch.empty_like(h[0])]
    return [h, *(torch.empty_like(h) for _ in range(_CELLS[cell].keeps * keep))]


@torch.library.custom_op("funcnet::recurrent_backward", mutates_args=())
def _backward(
    cell: str,
    x: Tensor,
    h: Tensor,
    kept: Sequence[Tensor],
    dh: Tensor,
    weights: Sequence[Tensor],
    reverse: bool,
    of_params: bool,
    of_x: bool,
) -> list[Tensor]:
    need = Need(of_params, of_x)
    with torch.no_grad():
        dweights, dx = _CELLS[cell].backward(Run(x, h, kept), dh, Weights(*weights), reverse, need)
    return [grad.contiguous() for grad in (*(dweights or ()), dx) if grad is not None]


@_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, x, _, _, _, weights, _, of_params, of_x = arguments
    likes = [*(weights if of_params else ()), *([x] if of_x else ())]
    return [like.new_empty(like.shape) for like in likes]


@torch.library.custom_op("funcnet::lstm_kernel_backward", mutates_args=("entries",))
def _kernel_backward(
    x: Tensor,
    h: Tensor,
    entries: Tensor,
    last_c: Tensor,
    dh: Tensor,
    weights: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, the weights' gradients); without biases, the last two have no entries."""
    run, need = Run(x, h, Workspace(entries, last_c)), Need(consume=True)
    with torch.no_grad():
        grads: Any = recurrent.kernel_backward(run, dh, Weights(*weights), reverse, need)
    (ih, hh, *biases), dx = grads
    bias_ih, bias_hh = (x.new_empty(0) if bias is None else bias for bias in biases)
    return dx, ih, hh, bias_ih, bias_hh


@_kernel_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, _, _, _, _, weights, _ = arguments
    shapes = [like.shape for like in (x, *weights)] + [(0,)] * (4 - len(weights))
    return tuple(x.new_empty(shape) for shape in shapes)


def _there(weights: Weights) -> list[Tensor]:
    return [weight for weight in weights if weight is not None]
