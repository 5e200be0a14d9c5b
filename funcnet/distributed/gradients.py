"""The gradient of the union of all ranks' batches, sent while the backward pass runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.by_layer import Passes
from funcnet.checks import as_int
from funcnet.distributed.call import Call, between_graphs, signature, together
from funcnet.distributed.sums import Sums
from funcnet.gradients import (
    check_batch,
    check_net_and_loss,
    check_reduction,
    check_uncoupled,
    contribution,
    terms,
)
from funcnet.keys import Key, fold_in
from funcnet.layer import Layer, Tree
from funcnet.leaves import joins, places
from funcnet.losses.loss import Loss
from funcnet.optimizers.leaves import flatten

BUCKET_BYTES = 4 * 2**20
"""An all-reduce of n bytes by k ranks takes about 2(k − 1)·a + 2n/b, with a latency a of 30 µs and
1 GB/s for b over Ethernet: for k = 64 the latency is 4 ms, a third of a bucket's time. Larger
buckets would leave later, and less of them would be hidden behind the backward pass."""


def value_and_grad(
    net: Layer, loss: Loss, group: Any = None, *, bucket_bytes: int = BUCKET_BYTES
) -> ValueAndGrad:
    """The function (params, x, target, key=None) ↦ (value, grads) of all ranks' examples together,
    as `fn.value_and_grad` gives them for the union of the batches.

    Each rank hands over its part of the batch, which may be empty, and the same params. A mean is
    over the whole batch: a part weighs as much as it has examples, or terms that count where
    `CrossEntropy` ignores some. Every rank gets the same bits, in new tensors.

    Gradients are added up while the backward pass runs. The last layer's are sent as soon as they
    are there, the others in buckets of `bucket_bytes`; zeros of `Frozen` layers are not sent.
    Gradients within a `Loop` or `Repeat` are sent when all its turns are done.

    All ranks hand over the same key. Rank r of the group draws from `fold_in(key, r)`, as
    micro-batch r does: k ranks with equal parts draw the masks of k micro-batches.

    Autograd does not record the call.

    Raises TypeError if net is not a Layer or loss not a loss; ValueError if a layer couples
    examples (BatchNorm), if the loss is not a `Loss` with a reduction "mean" or "sum", and for
    params that differ in structure, shapes or dtypes between the ranks; RuntimeError if another
    rank raises or is lost. Errors of the network and the loss pass through.
    Li et al., "PyTorch Distributed: experiences on accelerating data parallel training", 2020.

    >>> import funcnet as fn
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net = fn.Sequential(fn.Linear(8), fn.Tanh(), fn.Linear(3))
    >>> params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    >>> grads_of = fn.distributed.value_and_grad(net, fn.MSE())
    >>> value, grads = grads_of(params, x, torch.zeros(5, 3))
    >>> bool(value == fn.value_and_grad(net, fn.MSE())(params, x, torch.zeros(5, 3))[0])
    True
    >>> dist.destroy_process_group()
    """
    who = "distributed.value_and_grad"
    check_net_and_loss(who, net, loss)
    check_uncoupled(who, net)
    check_reduction(who, loss)
    return ValueAndGrad(net, loss, group, as_int(who, "bucket_bytes", bucket_bytes, 1))


@dataclass(frozen=True)
class ValueAndGrad:
    """A value that `value_and_grad` makes."""

    net: Layer
    loss: Any
    group: Any = field(compare=False)
    bucket_bytes: int

    def __repr__(self) -> str:
        size = "" if self.bucket_bytes == BUCKET_BYTES else f", bucket_bytes={self.bucket_bytes}"
        return f"distributed.value_and_grad({self.net!r}, {self.loss!r}{size})"

    @between_graphs
    @torch.no_grad()
    def __call__(
        self, params: Tree, x: Tensor, target: Any, key: Key | None = None
    ) -> tuple[Tensor, Tree]:
        """(the loss, its gradient with respect to params), of all ranks' examples together."""
        with together("distributed.value_and_grad", self.group) as call:
            return self._of(call, params, x, target, key)

    def _of(
        self, call: Call, params: Tree, x: Tensor, target: Any, key: Key | None
    ) -> tuple[Tensor, Tree]:
        check_batch(call.who, x, target)
        leaves, structure = flatten(call.who, "params", params)
        is_mean = self.loss.reduction == "mean"
        count = terms(self.loss, x, target) if is_mean else 0
        counts = call.agree(signature(structure, leaves), count)
        passes = Passes(self.net)
        y, residuals = passes.fwd(params, x, None if key is None else fold_in(key, call.rank))
        value, kept = self.loss.fwd(y, target)
        whole, share = sum(counts()), 1.0
        if whole:
            value, share = contribution(value, count, whole)
        dy = self.loss.bwd(kept, share)
        del y, kept  # the network's backward pass needs the memory
        sums = Sums(call, self.bucket_bytes)
        sums.add("value", value)
        order, fixed = _numbered(self.net, structure)
        grads: dict[Any, Tensor] = {}

        def put(found: tuple[str, Tree]) -> None:
            path, dparams = found
            own = dict(zip(order[path], optree.tree_leaves(dparams), strict=True))
            grads.update(own)
            moving = [i for i in own if i not in fixed]
            is_last_layer = bool(moving) and not sums.is_under_way
            for i in moving:
                sums.add(i, own[i])
            if is_last_layer:
                sums.send()  # the rest of the backward pass hides it

        passes.bwd(params, residuals, dy, put)
        grads.update(sums.wait())
        whole_grads: Tree = structure.unflatten(grads[i] for i in range(len(leaves)))
        return grads["value"], whole_grads


def _numbered(net: Layer, structure: optree.PyTreeSpec) -> tuple[dict[str, list[int]], set[int]]:
    """(the numbers of params' leaves by their layer's path, the numbers that do not learn)."""
    numbers = structure.unflatten(range(structure.num_leaves))
    order = {
        path: optree.tree_leaves(own)
        for path, _, own in places(net, numbers, lambda layer: joins(layer) is not None)
    }
    fixed = {
        i
        for _, layer, own in places(net, numbers, lambda layer: joins(layer) == "apart")
        if not layer._learns(own)
        for i in optree.tree_leaves(own)
    }
    return order, fixed
