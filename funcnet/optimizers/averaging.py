"""A running average of parameters."""

from __future__ import annotations

from funcnet.checks import as_number
from funcnet.layer import Tree
from funcnet.ops.each import Each
from funcnet.optimizers.leaves import flatten, flatten_like


def average(average: Tree, params: Tree, decay: float) -> Tree:
    """average + (1 − decay) · (params − average): the next exponential moving average of params.

    The result is a new tree. A leaf of the average keeps its floating-point dtype, which may differ
    from that of params: a float32 average of bfloat16 parameters takes steps so small that bfloat16
    would round them away.

    Raises ValueError unless 0 ≤ decay ≤ 1, or if the trees differ in structure or shapes; TypeError
    for a leaf that is not a floating-point or complex tensor.
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.

    >>> import torch
    >>> average({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, 0.75)
    {'w': tensor([1.2500])}
    """
    as_number("average", "decay", decay, 0.0, 1.0)
    ps, structure = flatten("average", "params", params)
    averages = flatten_like("average", "average", average, ps, structure, any_dtype=True)
    flatten("average", "average", average)
    ps = [p.to(a.dtype) for p, a in zip(ps, averages, strict=True)]
    return structure.unflatten(Each(write=False).lerp_(averages, ps, 1 - float(decay)))
