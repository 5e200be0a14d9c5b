"""Recurrent layers: a cell, step after step, in one direction or in both, layer upon layer.

What a cell takes from x is linear: a = x·W_ihᵀ + b_ih is one product for all T steps. Then, for
each step, with h₋₁ for h of the step before and u = h₋₁·W_hhᵀ + b_hh,

    Elman   h = σ(a + u)
    LSTM    i, f, g, o = σ, σ, tanh, σ of a + u;     c = f∘c₋₁ + i∘g,     h = o∘tanh(c)
    GRU     r, z = σ of a + u,  n = tanh(a + r∘u);   h = (1 − z)∘n + z∘h₋₁

The way back starts from the last step. The slopes of a cell do not depend on the gradient that
arrives, so they are computed for all steps at once; a step multiplies by them, and adds du·W_hh to
the gradient of h₋₁. Then dx = da·W_ih, dW_ih = daᵀ·x and dW_hh = duᵀ·h₋₁ are one product each, for
all steps.

Tensors have the steps first, (T, N, …). In the reversed direction, the step before t is t + 1.
Half precision is computed in float32, except where PyTorch's kernel for the LSTM takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from funcnet.compat import is_mkldnn_enabled, mkldnn_rnn, mkldnn_rnn_backward
from funcnet.ops import processor
from funcnet.ops.accumulation import accumulator_dtype, widened
from funcnet.ops.inplace import has_no_tape, is_transforming, is_untracked
from funcnet.ops.need import Need
from funcnet.ops.products import Products, product_of_rows

_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default


class Weights(NamedTuple):
    """The parameters of one layer in one direction, or their gradients, for G gates.

    The gradients are those of each example, as `Products`, where `need.each` asks for them.
    """

    ih: Any  # (G·H, C)
    hh: Any  # (G·H, H)
    bias_ih: Any = None  # (G·H,), or both None
    bias_hh: Any = None


Layers: TypeAlias = Sequence[Sequence[Weights]]
"""The directions of each layer: forward, or forward and reversed."""


class Run(NamedTuple):
    """A forward pass of one layer in one direction: x (T, N, C), h (T, N, H), other residuals."""

    x: Tensor
    h: Tensor
    kept: Any


class Cell(Protocol):
    """All steps of one direction."""

    name: str
    keeps: ClassVar[int] = 0
    """The number of tensors, of the shape of h, that `steps` keeps beside it."""
    whole: ClassVar[Callable[..., Any] | None] = None
    """PyTorch's function for y of all layers, where it is faster than steps in Python."""

    def has_kernel(self, x: Tensor) -> bool:
        """Whether PyTorch may have a kernel for all steps of x."""
        return False

    def is_for_kernel(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether the kernel is called for these tensors; then x of 16 bits stays as it is."""
        return False

    def forward(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        """(h, what else `backward` needs, if `keep`)."""
        return self.steps(x, weights, reverse, keep)

    def steps(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        """`forward`, step after step, without a kernel."""

    def backward(self, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need) -> Any:
        """(the weights' gradients, dx), None where they are not needed."""


def apply(cell: Cell, x: Tensor, layers: Layers) -> Tensor:
    """y (N, T, H), or (N, T, 2H) in both directions, of x (N, T, C)."""
    runs = [*chain(*layers)]
    if cell.whole is None or not (x.is_cpu and is_untracked(x, *chain(*runs))):
        return forward(cell, x, layers, keep=False)[0]
    wide = widened(x)
    has_bias, is_bidirectional = runs[0].bias_ih is not None, len(runs) > len(layers)
    h = wide.new_zeros(len(runs), len(x), runs[0].hh.shape[1])
    weights = [w for own in runs for w in _cast(own, wide.dtype) if w is not None]
    y: Tensor
    y, _ = cell.whole(wide, h, weights, has_bias, len(layers), 0.0, False, is_bidirectional, True)
    return y.to(dtype=x.dtype)


def forward(cell: Cell, x: Tensor, layers: Layers, keep: bool = True) -> tuple[Tensor, Any]:
    """(y, residuals if `keep`): y (N, T, H), or (N, T, 2H) in both directions, of x (N, T, C)."""
    dtype, residuals = x.dtype, []
    x, accumulator = x.transpose(0, 1), accumulator_dtype(dtype)
    if dtype != accumulator and not cell.is_for_kernel(x, *chain(*chain(*layers))):
        x = x.to(accumulator)
    for directions in layers:
        hs, kept = [], []
        for i, weights in enumerate(directions):
            h, own = _run(cell, x, _cast(weights, x.dtype), bool(i), keep)
            hs.append(h)
            kept.append(own)
        h = torch.cat(hs, -1) if len(hs) > 1 else hs[0]
        if keep:
            residuals.append((x, h, kept))
        x = h
    return x.transpose(0, 1).to(dtype=dtype), residuals


def gradients(
    cell: Cell, residuals: Any, layers: Layers, grad: Tensor, need: Need
) -> tuple[list[list[Any]], Tensor | None]:
    """(the weights' gradients by layer and direction, dx), None where they are not needed."""
    dlayers: list[list[Any]] = [[] for _ in layers]
    dh: Any = grad.transpose(0, 1)
    for number in range(len(layers) - 1, -1, -1):
        x, h, kept = residuals[number]
        directions = layers[number]
        wanted = need._replace(input=need.input or number > 0)
        hs, dhs = (t.chunk(len(directions), -1) for t in (h, dh.to(dtype=h.dtype)))
        dh = None
        for i, weights in enumerate(directions):
            run, own = Run(x, hs[i], kept[i]), _cast(weights, x.dtype)
            dweights, dx = _run_back(cell, run, dhs[i], own, bool(i), wanted)
            dlayers[number].append(
                dweights if need.each else dweights and _cast(dweights, grad.dtype)
            )
            dh = dx if dh is None else dh + dx
    return dlayers, dh.transpose(0, 1).to(dtype=grad.dtype) if need.input else None


def _is_one_operation(*tensors: Tensor | None) -> bool:
    """Whether torch.compile compiles this, and needs no rule for vmap or a derivative of it."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not is_transforming()
        and has_no_tape(*tensors)
    )


def _run(cell: Cell, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
    if _is_one_operation(x, *weights):
        from funcnet.ops import recurrent_op

        return recurrent_op.forward(cell, x, weights, reverse, keep)
    return cell.forward(x, weights, reverse, keep)


def _run_back(cell: Cell, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need) -> Any:
    if _is_one_operation(run.x, run.h, dh, *weights) and not need.each:
        from funcnet.ops import recurrent_op

        return recurrent_op.backward(cell, run, dh, weights, reverse, need)
    return cell.backward(run, dh, weights, reverse, need)


# --- The cells


@dataclass(frozen=True)
class Elman(Cell):
    """h = σ(a + u), da = du = σ' ∘ dh; `value_` is σ in place, and `slope(dh, h)` is σ' ∘ dh."""

    name: str
    value_: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    def steps(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        a = _inputs(x, weights.ih, _sum(weights.bias_ih, weights.bias_hh)).unbind(0)
        h = x.new_zeros(x.shape[1], weights.hh.shape[1])
        hs: list[Any] = [None] * len(a)
        weight = weights.hh.mT
        for t in _order(len(a), reverse):
            h = hs[t] = self.value_(torch.addmm(a[t], h, weight))
        return torch.stack(hs), ()

    def backward(self, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need) -> Any:
        x, h, _ = run
        hs, dhs = h.unbind(0), dh.unbind(0)
        das: list[Any] = [None] * len(hs)
        da: Any = None
        for t in _order(len(hs), not reverse):
            dh = dhs[t] if da is None else torch.addmm(dhs[t], da, weights.hh)
            da = das[t] = self.slope(dh, hs[t])
        da = torch.stack(das)
        return _products(x, h, da, da, weights, reverse, need)


TANH = Elman("tanh", torch.tanh_, _tanh_backward)
RELU = Elman("relu", torch.relu_, lambda dh, h: torch.ops.aten.threshold_backward.default(dh, h, 0))


@dataclass(frozen=True)
class LSTM(Cell):
    """Gates i, f, g, o with c = f∘c₋₁ + i∘g and h = o∘tanh(c):

        dc = f₊₁∘dc₊₁ + o(1 − tanh²c)∘dh,    and da = du has, for i, f, g and o,
        i(1 − i)∘g∘dc,    f(1 − f)∘c₋₁∘dc,    (1 − g²)∘i∘dc,    o(1 − o)∘tanh(c)∘dh.

    On the CPU, PyTorch has a kernel for all steps, in float32 and in bfloat16. In bfloat16 its
    errors are autocast's, 1.2 to 2 times those of float32 at the weights that `init` draws.
    """

    name = "LSTM"
    keeps = 5

    def has_kernel(self, x: Tensor) -> bool:
        return (
            x.is_cpu
            and (x.dtype == torch.float32 or processor.multiplies_bfloat16(x))
            and x.numel() > 0
        )

    def is_for_kernel(self, x: Tensor, *others: Tensor | None) -> bool:
        # The kernel has no rule for vmap and no second derivative.
        return self.has_kernel(x) and is_untracked(x, *others) and kernel_is_there()

    def forward(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        if self.is_for_kernel(x, *weights):
            return kernel_forward(x, weights, reverse, keep)
        return self.steps(x, weights, reverse, keep)

    def steps(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        a = _inputs(x, weights.ih, _sum(weights.bias_ih, weights.bias_hh)).unbind(0)
        h = c = x.new_zeros(x.shape[1], weights.hh.shape[1])
        steps: list[Any] = [None] * len(a)
        weight = weights.hh.mT
        for t in _order(len(a), reverse):
            i, f, g, o = torch.addmm(a[t], h, weight).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = torch.addcmul(i * g, f, c)
            h = o * c.tanh()
            steps[t] = (h, i, f, g, o, c) if keep else (h,)
        h, *kept = map(torch.stack, zip(*steps, strict=True))
        return h, kept

    def backward(self, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need) -> Any:
        x, h, kept = run
        if isinstance(kept, Workspace):
            # The h of one direction may be a part of what autograd tracks for the other's.
            if self.is_for_kernel(x, h, *weights, dh) and not need.each:
                return kernel_backward(run, dh, weights, reverse, need)
            # Nothing but the kernel can read its workspace.
            x, dh = widened(x), widened(dh)
            weights = _cast(weights, x.dtype)
            h, kept = self.steps(x, weights, reverse, keep=True)
        i, f, g, o, c = kept
        tanh_c = c.tanh()
        slopes_h = _tanh_backward(o, tanh_c).unbind(0)
        parts = (
            _sigmoid_backward(g, i),
            _sigmoid_backward(_before(c, reverse), f),
            _tanh_backward(i, g),
            _sigmoid_backward(tanh_c, o),
        )
        slopes = torch.stack(parts, 2).unbind(0)
        fs, dhs = f.unbind(0), dh.unbind(0)
        das: list[Any] = [None] * len(dhs)
        da: Any = None
        for t in _order(len(dhs), not reverse):
            if da is None:
                dh = dhs[t]
                dc = slopes_h[t] * dh
            else:
                dh = torch.addmm(dhs[t], da, weights.hh)
                dc = torch.addcmul(dc, slopes_h[t], dh)
            da = das[t] = (slopes[t] * torch.stack((dc, dc, dc, dh), 1)).flatten(1)
            dc = fs[t] * dc
        da = torch.stack(das)
        return _products(x, h, da, da, weights, reverse, need)


@dataclass(frozen=True)
class GRU(Cell):
    """Gates r, z, n with h = (1 − z)∘n + z∘h₋₁; dh₋₁ gets z∘dh + du·W_hh. da and du are

    r: r(1 − r)∘u_n∘dn,    z: z(1 − z)∘(h₋₁ − n)∘dh,
    n: dn = (1 − z)(1 − n²)∘dh in da, and r∘dn in du.
    """

    name = "GRU"
    keeps = 4
    whole = torch.gru

    def steps(self, x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
        size = weights.hh.shape[1]
        sizes = [2 * size, size]
        hh_rz, hh_n = torch.split(weights.hh, sizes)
        bias, bias_n = weights.bias_ih, None
        if bias is not None:
            bias_rz, bias_n = torch.split(weights.bias_hh, sizes)
            bias = bias + torch.cat((bias_rz, torch.zeros_like(bias_n)))
        a_rz, a_n = (
            part.unbind(0) for part in torch.split(_inputs(x, weights.ih, bias), sizes, -1)
        )
        h = x.new_zeros(x.shape[1], size)
        steps: list[Any] = [None] * len(a_n)
        weight = hh_rz.mT
        for t in _order(len(a_n), reverse):
            r, z = torch.addmm(a_rz[t], h, weight).sigmoid_().chunk(2, -1)
            u_n = F.linear(h, hh_n, bias_n)
            n = torch.addcmul(a_n[t], r, u_n).tanh_()
            h = torch.lerp(n, h, z)
            steps[t] = (h, r, z, n, u_n) if keep else (h,)
        h, *kept = map(torch.stack, zip(*steps, strict=True))
        return h, kept

    def backward(self, run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need) -> Any:
        x, h, (r, z, n, u_n) = run
        size = h.shape[-1]
        slope_n = _tanh_backward(1 - z, n)
        slope_r = _sigmoid_backward(slope_n * u_n, r)
        slope_z = _sigmoid_backward(_before(h, reverse) - n, z)
        # Side by side: du (n, r, z) are the first three, da (r, z, n) the last three.
        slopes = torch.stack((r * slope_n, slope_r, slope_z, slope_n), 2).unbind(0)
        weight = weights.hh.roll(size, 0)
        zs, dhs = z.unbind(0), dh.unbind(0)
        both: list[Any] = [None] * len(dhs)
        later: Any = None
        for t in _order(len(dhs), not reverse):
            if later is None:
                dh = dhs[t]
            else:
                passed = torch.addcmul(dhs[t], zs[later], dh)
                dh = torch.addmm(passed, both[later].narrow(1, 0, 3 * size), weight)
            both[t] = (slopes[t] * dh.unsqueeze(1)).flatten(1)
            later = t
        da_du = torch.stack(both)
        da, du = da_du.narrow(-1, size, 3 * size), da_du.narrow(-1, 0, 3 * size)
        if need.each:
            return _products(x, h, da, du.roll(-size, -1), weights, reverse, need)
        dweights, dx = _products(x, h, da, du, weights, reverse, need)
        if dweights is not None:
            bias_hh = None if dweights.bias_hh is None else dweights.bias_hh.roll(-size, 0)
            dweights = dweights._replace(hh=dweights.hh.roll(-size, 0), bias_hh=bias_hh)
        return dweights, dx


# --- PyTorch's kernel for the LSTM. Handed tensors that are not contiguous, it reads them wrongly.

_IS_THERE = mkldnn_rnn is not None and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_KIND = 2  # the kernel's number for an LSTM


class Workspace(NamedTuple):
    """The kernel's residuals, which nothing else can read."""

    entries: Tensor
    last_c: Tensor


def kernel_is_there() -> bool:
    """Whether PyTorch has the kernel, and its user has not turned it off."""
    return _IS_THERE and is_mkldnn_enabled()


def kernel_forward(x: Tensor, weights: Weights, reverse: bool, keep: bool) -> Any:
    size = weights.hh.shape[1]
    zeros = x.new_zeros(x.shape[1], size)
    inputs = [t.detach() for t in (x.contiguous(), *_readable(weights), zeros, zeros)]
    with torch.set_grad_enabled(keep):  # which decides whether there is a workspace
        h, _, c, entries = mkldnn_rnn(
            *inputs, reverse, [], _KIND, size, 1, True, False, False, keep
        )
    return h, Workspace(entries, c) if keep else ()


def kernel_backward(
    run: Run, dh: Tensor, weights: Weights, reverse: bool, need: Need
) -> tuple[Weights | None, Tensor | None]:
    x, h, kept = run
    size = h.shape[-1]
    zeros = x.new_zeros(x.shape[1], size)
    inputs = x.contiguous(), *_readable(weights), zeros, zeros
    outputs = h.contiguous(), h[0 if reverse else -1].contiguous(), kept.last_c
    grads = dh.contiguous(), None, None
    # The kernel writes to its workspace.
    entries = kept.entries if need.consume else kept.entries.clone()
    options: Any = reverse, _KIND, size, 1, True, True, False, [], False
    dx, ih, hh, bias_ih, bias_hh, _, _ = mkldnn_rnn_backward(
        *inputs, *outputs, *grads, *options, entries
    )
    biases: Any = () if weights.bias_ih is None else (bias_ih, bias_hh)
    return Weights(ih, hh, *biases) if need.params else None, dx if need.input else None


def _readable(weights: Weights) -> list[Any]:
    """The weights as the kernel reads them: contiguous, and with biases."""
    none = weights.hh.new_zeros(len(weights.hh)) if weights.bias_ih is None else None
    return [none if weight is None else weight.contiguous() for weight in weights]


# --- What the cells share


def _order(steps: int, reverse: bool) -> range:
    """The steps in the order in which they are taken."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a = x·Wᵀ + b for all steps."""
    steps, examples, _ = x.shape
    return F.linear(x.flatten(0, 1), weight, bias).view(steps, examples, len(weight))


def _sum(bias: Any, other: Any) -> Any:
    return None if bias is None else bias + other


def _before(h: Tensor, reverse: bool) -> Tensor:
    """h of the step before each step, 0 before the first."""
    zero = torch.zeros_like(h.narrow(0, 0, 1))
    others = h.narrow(0, int(reverse), len(h) - 1)
    return torch.cat((others, zero) if reverse else (zero, others))


def _products(
    x: Tensor, h: Tensor, da: Tensor, du: Tensor, weights: Weights, reverse: bool, need: Need
) -> tuple[Weights | None, Tensor | None]:
    """(the weights' gradients, dx), given the gradients of a and u."""
    dweights = None
    if need.params:
        first, count = int(reverse), len(h) - 1  # before the first step taken, h is 0
        after, before = du.narrow(0, 1 - first, count), h.narrow(0, first, count)
        summed = 0 if need.each else (0, 1)
        biases: Any = () if weights.bias_ih is None else (da.sum(summed), du.sum(summed))
        product = _product_each if need.each else product_of_rows
        dweights = Weights(product(da, x), product(after, before), *biases)
    return dweights, da @ weights.ih if need.input else None


def _product_each(dy: Tensor, x: Tensor) -> Products:
    """Σ dyᵀ·x over steps, for each example."""
    return Products(dy.transpose(0, 1), x.transpose(0, 1))


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    if weights.ih.dtype == dtype:
        return weights
    return Weights(*(None if t is None else t.to(dtype=dtype) for t in weights))
