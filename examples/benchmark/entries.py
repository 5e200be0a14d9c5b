"""All contenders by name."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from contenders import Contender, funcnet_compiled, funcnet_in_place, funcnet_pure, torch_nn
from cuda_graph import funcnet_graph
from networks import MSE, SGD
from problem import Problem

import funcnet as fn

Entry: TypeAlias = Callable[[Problem], Contender]

OURS = "funcnet"
PURE = "funcnet, pure step"
GRAPH = "funcnet, CUDA graph"
COMPILED = "funcnet, torch.compile"
CHANNELS_LAST = "torch.nn channels_last"
JAX = "JAX stax, jit"


_IN_STAX = (fn.Conv2d, fn.UpsampleConv2d, fn.Upsample2d, fn.Sigmoid, fn.ReLU)


def entries(device: torch.device, compiled: bool = True, jax: bool = True) -> dict[str, Entry]:
    """The contenders by name, ours first; JAX's where it is installed."""
    chosen: dict[str, Entry] = {
        OURS: funcnet_in_place,
        PURE: funcnet_pure,
        "torch.nn": functools.partial(torch_nn, layout=torch.contiguous_format),
        CHANNELS_LAST: functools.partial(torch_nn, layout=torch.channels_last),
    }
    if device.type == "cuda":
        chosen[GRAPH] = funcnet_graph
    if compiled:
        chosen[COMPILED] = functools.partial(funcnet_compiled, compiler=_compile)
        # Inductor lays convolutions out in channels_last by itself, so it is handed that.
        chosen["torch.compile"] = functools.partial(
            torch_nn, layout=torch.channels_last, compiler=_compile
        )
    if jax and importlib.util.find_spec("jax"):
        from jax_stax import jax_stax

        chosen[JAX] = jax_stax
    return chosen


def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def takes_part(name: str, problem: Problem) -> bool:
    """Whether a contender has something of its own to show for a problem."""
    network = problem.network
    if name == CHANNELS_LAST:
        return len(network.shape) > 2  # else it is torch.nn once more
    if name == GRAPH:
        return isinstance(network.optimizer, fn.SGD) and not network.is_layer
    if name == JAX:
        plain = (network.loss, network.optimizer) == (MSE, SGD) and not problem.mixed
        return plain and all(isinstance(layer, _IN_STAX) for layer in network.net)
    return True
