"""Bugs in training by many processes. Each has to be one that all ranks make alike."""

from __future__ import annotations

from ..mutant import Row, in_file

DISTRIBUTED = (
    *in_file(
        "distributed/gradients.py",
        "test_distributed.py::test_every_rank",
        Row(
            "rank-forgotten",
            "None if key is None else fold_in(key, call.rank)",
            "key",
            "each rank draws masks of its own",
        ),
        Row(
            "mean-of-means",
            "contribution(value, count, whole)",
            "contribution(value, 1, call.size)",
            "a part weighs as much as it has examples",
        ),
    ),
    *in_file(
        "distributed/call.py",
        "test_distributed.py::test_every_rank",
        Row(
            "mean-across-ranks",
            "work = dist.all_reduce(tensor, group=self.group, async_op=True)",
            "work = dist.all_reduce(tensor.div_(self.size), group=self.group, async_op=True)",
            "contributions are added, not averaged",
        ),
    ),
    *in_file(
        "distributed/sums.py",
        "test_distributed.py::test_every_rank",
        Row(
            "added-in-16-bits",
            "dtype = accumulator_dtype(tensor.dtype)",
            "dtype = tensor.dtype",
            "16 bits do not hold a sum of many small terms",
        ),
    ),
    *in_file(
        "distributed/mean.py",
        "test_distributed.py::test_every_rank",
        Row(
            "weight-forgotten",
            "widened(leaf) * share",
            "widened(leaf) / call.size",
            "the mean is weighted",
        ),
    ),
    *in_file(
        "distributed/sharded.py",
        "test_distributed.py::test_every_rank",
        Row(
            "received-leaves-not-written",
            "leaves[i].copy_(value)",
            "leaves[i] = value",
            "step_ writes into the params of all ranks",
        ),
    ),
)
