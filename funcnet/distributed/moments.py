"""The moments of all ranks' examples."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

from funcnet import batch_statistics
from funcnet.distributed.call import between_graphs, signature, together
from funcnet.layer import Tree
from funcnet.optimizers.leaves import flatten


@between_graphs
@torch.no_grad()
def merge_moments(m: Tree, group: Any = None) -> Tree:
    """The moments of all ranks' examples together, from each rank's own `fn.moments`.

    They are merged in the order of the ranks, by `fn.merge_moments`, so that every rank gets the
    same bits. A rank without examples adds nothing.

    Raises TypeError for a leaf that is not a floating-point tensor; ValueError for what are not
    moments, and for trees that differ between the ranks; RuntimeError if another rank raises or is
    lost.

    >>> import funcnet as fn
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> m = fn.moments(fn.BatchNorm(affine=False), (), torch.tensor([[1.0], [3.0]]), key=fn.key(0))
    >>> [float(moment) for moment in fn.distributed.merge_moments(m)]
    [2.0, 2.0, 2.0]
    >>> dist.destroy_process_group()
    """
    with together("distributed.merge_moments", group) as call:
        leaves, structure = flatten("distributed.merge_moments", "m", m)
        batch_statistics.merge_moments(m, m)  # raises for what are not moments
        call.agree(signature(structure, leaves))()
        if not leaves:
            return m
        packed = torch.cat([leaf.reshape(-1) for leaf in leaves])

        def unpacked(row: torch.Tensor) -> Tree:
            parts = torch.split(row, [leaf.numel() for leaf in leaves])
            pairs = zip(parts, leaves, strict=True)
            return structure.unflatten(part.reshape(leaf.shape).clone() for part, leaf in pairs)

        return reduce(batch_statistics.merge_moments, map(unpacked, call.all_gather(packed)()))
