"""An optimiser whose state is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import optree
import torch
from torch import Tensor

from funcnet.distributed.call import Call, between_graphs, signature, together
from funcnet.fields import InstanceOf
from funcnet.layer import Tree
from funcnet.optimizers.leaves import check_writable, flatten, flatten_up_to
from funcnet.optimizers.optimizer import Optimizer, PreparedStep, State


@dataclass(frozen=True)
class Sharded(Optimizer[State]):
    """Another optimiser, whose steps the ranks share. Each does a part, and keeps its state.

    Every leaf of params belongs to one rank, which alone keeps its moments, steps it, and then
    broadcasts it to the others. With k ranks the state takes about 1/k of the memory: the largest
    leaves are dealt out first, each to the rank that has the least. All ranks end with the same
    bits. A step needs the same gradients on all ranks, as `fn.distributed.value_and_grad` gives.

    The state is the other optimiser's, of params with None for the leaves of other ranks. It can be
    saved, one file a rank, and loaded by the same rank of as many ranks. `step` and `step_` are
    called by all ranks together. Leaves that a `Partition` inside freezes are broadcast all the
    same; those of `Partition(label, {"learned": Sharded(Adam()), "frozen": None})` are not.

    Raises TypeError unless `optimizer` is an optimiser. `step` raises ValueError for params that
    differ in structure, shapes or dtypes between the ranks, RuntimeError if another rank raises or
    is lost, and what the other optimiser raises. Nothing has been changed then, unless a rank was
    lost in the middle of a step.
    Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
    2020, stage 1.

    >>> import funcnet as fn
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> adam = fn.distributed.Sharded(fn.Adam(lr=0.1))
    >>> params = {"weight": torch.tensor([1.0])}
    >>> adam.step(params, {"weight": torch.tensor([2.0])}, adam.init(params))[0]
    {'weight': tensor([0.9000])}
    >>> dist.destroy_process_group()
    """

    optimizer: Annotated[Optimizer[State], InstanceOf(Optimizer, "an optimiser")]
    group: Any = field(default=None, compare=False)

    @between_graphs
    def init(self, params: Tree) -> State:
        """The state of this rank's leaves before the first step."""
        leaves, structure = flatten(self, "params", params)
        call = Call("Sharded", self.group)
        return self.optimizer.init(_own(leaves, structure, _owners(leaves, call.size), call.rank))

    @between_graphs
    def _prepare(self, params: Tree, grads: Tree, state: State, write: bool) -> PreparedStep[State]:
        with together("Sharded", self.group) as call:
            leaves, structure = flatten(self, "params", params)
            gs = flatten_up_to(self, "grads", grads, structure)
            if write:
                check_writable(self, leaves)
            owners = _owners(leaves, call.size)
            own_step = self.optimizer._prepare(
                _own(leaves, structure, owners, call.rank),
                _own(gs, structure, owners, call.rank),
                state,
                write,
            )
            # No rank begins to write unless all can.
            call.agree(signature(structure, leaves))()

        @between_graphs
        def step() -> tuple[Tree, State]:
            own, new_state = own_step()
            new = list(leaves)
            mine = [i for i, owner in enumerate(owners) if owner == call.rank]
            for i, leaf in zip(mine, optree.tree_leaves(own), strict=True):
                new[i] = leaf
            with together("Sharded", self.group) as sharing, torch.no_grad():
                received = _shared(sharing, new, owners)
                for i, value in received.items():
                    if write:
                        leaves[i].copy_(value)
                    else:
                        new[i] = torch.empty_like(leaves[i]).copy_(value)
            return params if write else structure.unflatten(new), new_state

        return step


def _owners(leaves: list[Tensor], size: int) -> list[int]:
    """The rank of each leaf: the largest leaves first, each to the rank that has the least."""
    loads, owners = [0] * size, [0] * len(leaves)
    for i in sorted(range(len(leaves)), key=lambda i: -leaves[i].nbytes):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += leaves[i].nbytes
    return owners


def _own(leaves: list[Any], structure: optree.PyTreeSpec, owners: list[int], rank: int) -> Tree:
    """The tree with None for the leaves of other ranks: every other leaf keeps its path."""
    return structure.unflatten(
        leaf if owner == rank else None for leaf, owner in zip(leaves, owners, strict=True)
    )


def _shared(call: Call, leaves: list[Tensor], owners: list[int]) -> dict[int, Tensor]:
    """The leaves of the other ranks, each from its owner, in one message a rank."""
    messages = []
    for rank in range(call.size):
        numbers = [i for i, owner in enumerate(owners) if owner == rank]
        if any(leaves[i].numel() for i in numbers):
            packed = torch.cat([_as_bytes(leaves[i]) for i in numbers])
            messages.append((rank, numbers, packed, call.broadcast(packed, rank)))
    received = {}
    for rank, numbers, packed, wait in messages:
        wait()
        if rank == call.rank:
            continue
        parts = torch.split(packed, [leaves[i].nbytes for i in numbers])
        for i, part in zip(numbers, parts, strict=True):
            # A view of another dtype has to begin at a multiple of its size.
            received[i] = part.clone().view(leaves[i].dtype).view(leaves[i].shape)
    return received


def _as_bytes(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)
