"""The mean of a tree over all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from funcnet.checks import as_number
from funcnet.distributed.call import between_graphs, signature, together
from funcnet.distributed.sums import Sums
from funcnet.layer import Tree
from funcnet.ops.accumulation import widened
from funcnet.optimizers.leaves import flatten


@between_graphs
@torch.no_grad()
def mean(tree: Tree, group: Any = None, weight: float | None = None) -> Tree:
    """Σᵣ wᵣ · treeᵣ / Σᵣ wᵣ over the ranks r of a group, leaf by leaf.

    `weight` is this rank's w, such as its number of examples; None is 1 on each rank. A rank of
    weight 0 does not count, whatever its numbers are. Every rank gets the same bits, in new tensors
    with the memory format of its own. All leaves of a dtype go in one all-reduce.

    Shapes: leaves (…), the same on all ranks.
    Raises TypeError for a leaf that is not a floating-point or complex tensor, and for a weight
    that is not a number; ValueError for a weight that is not finite or is below 0, for weights that
    are all 0, and for trees that differ between the ranks; RuntimeError if another rank raises or
    is lost.

    >>> import funcnet as fn
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fn.distributed.mean({"loss": torch.tensor(2.0)}, weight=16)
    {'loss': tensor(2.)}
    >>> dist.destroy_process_group()
    """
    with together("distributed.mean", group) as call:
        leaves, structure = flatten("distributed.mean", "tree", tree)
        own = 1.0 if weight is None else float(as_number("distributed.mean", "weight", weight, 0.0))
        weights = call.agree(signature(structure, leaves), own)()
        if not any(weights):
            raise ValueError(f"mean: expected a weight above 0 on one of {call.size} ranks")
        _, exponent = math.frexp(max(weights))  # scaled by a power of 2, so that no sum overflows
        share = math.ldexp(own, -exponent) / sum(math.ldexp(w, -exponent) for w in weights)
        sums = Sums(call)
        for i, leaf in enumerate(leaves):
            # In 16 bits a share of a small number would be 0.
            sums.add(i, widened(leaf) * share if own else torch.zeros_like(leaf))
        found = sums.wait()
        return structure.unflatten(found[i].to(leaf.dtype) for i, leaf in enumerate(leaves))
