"""A record of what passes through each layer of a network, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from funcnet.keys import Key
from funcnet.layer import Layer, Tree, check_net
from funcnet.leaves import Ancestors, Watched, has_children, joins, mapped
from funcnet.ops.need import Need
from funcnet.running import run_bwd, run_fwd


class Record(NamedTuple):
    """One run of a layer: y = layer.apply(params, x), and grad for ∂L/∂y."""

    path: str
    layer: Layer
    params: Tree
    x: Tensor
    y: Tensor
    grad: Tensor | None


def trace(
    net: Layer, params: Tree, x: Tensor, grad: Tensor | None = None, key: Key | None = None
) -> list[Record]:
    """Records (path, layer, params, x, y, grad) of the layers of a network, in the order they run.

    The layers are those that hold no others; `path` is their place in params, `stem.0`. One that
    runs several times, as in `Loop` or `Repeat`, has a record for each run. `params`, `x` and `y`
    are what the layer was handed and returned: of another dtype within `Cast`, of one copy within
    `Repeat`. Given `grad`, the gradient with respect to the network's y, a backward pass follows,
    and each record has the gradient with respect to its own y; without it, None.

    Raises what `apply` and `vjp` raise; TypeError if net is not a Layer.

    >>> import funcnet as fn
    >>> import torch
    >>> net = fn.Sequential(fn.Linear(2), fn.Residual(fn.Sequential(fn.Linear(2), fn.ReLU())))
    >>> params, x = net.init(fn.key(0), (3,)), torch.ones(1, 3)
    >>> records = fn.trace(net, params, x, grad=torch.ones(1, 2))
    >>> [(record.path, record.layer) for record in records]
    [('0', Linear(2)), ('1.0', Linear(2)), ('1.1', ReLU())]
    >>> records[0].x is x, records[2].grad
    (True, tensor([[1., 1.]]))
    """
    check_net("trace", net)
    notes = _Notes()
    watched = mapped(net, notes.traced, _enters)
    _, residuals = watched.fwd(params, x, key=key)
    notes.are_open = False
    if grad is not None:
        watched.bwd(params, residuals, grad)
    return [record._replace(grad=notes.grads.get(i)) for i, record in enumerate(notes.records)]


def _enters(layer: Layer) -> bool:
    return has_children(layer) and joins(layer) != "zeros"


@dataclass
class _Notes:
    """The layers' records of one forward pass, and of the gradients that follow it."""

    records: list[Record] = field(default_factory=list)
    grads: dict[int, Tensor] = field(default_factory=dict)  # by the record
    are_open: bool = True  # a backward pass may run layers again, which are no new records

    def traced(self, path: str, layer: Layer, ancestors: Ancestors) -> Layer:
        """The layer, whose runs are noted here."""
        if joins(layer) == "zeros":  # not itself: it may leave out the backward pass of its layer
            return mapped(layer._children()[0][1], self.traced, _enters, path)
        return _Traced(layer, path, self)

    def add(self, record: Record) -> int | None:
        if not self.are_open:
            return None
        self.records.append(record)
        return len(self.records) - 1

    def last(self, path: str) -> int:
        """The last run of the layer at a path that has no gradient yet."""
        runs = (i for i, record in enumerate(self.records) if record.path == path)
        return max(i for i in runs if i not in self.grads)


@dataclass(frozen=True)
class _Traced(Watched):
    notes: _Notes = field(compare=False)

    _fresh = False  # y is noted, and nobody may write over it

    def _fwd(self, params: Tree, x: Tensor, key: Key | None) -> tuple[Tensor, Any]:
        y, kept = run_fwd(self.layer, params, x, key)
        record = Record(self.path, self.layer, params, x, y, None)
        return y, (kept, self.notes.add(record))

    def _bwd(self, params: Tree, residuals: Any, dy: Tensor, need: Need) -> tuple[Tree, Any]:
        kept, run = residuals
        self.notes.grads[self.notes.last(self.path) if run is None else run] = dy
        return run_bwd(self.layer, params, kept, dy, need)
