"""A problem, the same for every contender: a network, its weights, and one batch of data."""

from __future__ import annotations

from dataclasses import dataclass

import optree
import torch
from networks import Network
from torch import Tensor

import funcnet as fn
from funcnet.layer import Tree


@dataclass(frozen=True)
class Problem:
    """A network at one batch size. Each contender gets data and weights of its own, all alike."""

    network: Network
    batch: int
    dtype: torch.dtype
    device: torch.device
    mixed: bool = False
    """Whether the network computes in bfloat16, while parameters and data are in `dtype`."""

    @property
    def net(self) -> fn.Layer:
        """The network that funcnet runs; for a layer, the layer."""
        net = self.network.net[0] if self.network.is_layer else self.network.net
        return fn.Cast(net, torch.bfloat16) if self.mixed else net

    def params(self) -> Tree:
        """The weights to start from."""
        params = self.network.net.init(fn.key(0), self.network.shape)
        return optree.tree_map(lambda leaf: self._own(leaf * self.network.gain), params)

    def x(self) -> Tensor:
        """The inputs, in PyTorch's default layout."""
        return self._normal(1, self.network.shape)

    def target(self) -> Tensor:
        """The outputs to reach; for a layer, the gradient that comes back to it."""
        shape = self.network.net.out_shape(self.network.shape)
        if isinstance(self.network.loss, fn.CrossEntropy):
            return torch.arange(self.batch, device=self.device) % shape[0]
        return self._normal(2, shape)

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        return self._own(fn.normal(fn.key(seed), (self.batch, *shape)))

    def _own(self, tensor: Tensor) -> Tensor:
        """The tensor in this dtype, rounded to bfloat16: the same numbers in every dtype."""
        return tensor.bfloat16().to(dtype=self.dtype, device=self.device)
