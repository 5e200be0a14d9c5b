"""Who takes part: all contenders by name."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from contenders import Contender, funcnet_in_place, funcnet_pure, torch_nn
from cuda_graph import funcnet_graph
from problem import Problem

Entry: TypeAlias = Callable[[Problem], Contender]

OURS = "funcnet"
PURE = "funcnet, pure step"
GRAPH = "funcnet, CUDA graph"


def entries(device: torch.device, compiled: bool = True, jax: bool = True) -> dict[str, Entry]:
    """Ours first; JAX's where it is installed."""
    chosen: dict[str, Entry] = {
        OURS: funcnet_in_place,
        PURE: funcnet_pure,
        "torch.nn": functools.partial(torch_nn, layout=torch.contiguous_format),
        "torch.nn channels_last": functools.partial(torch_nn, layout=torch.channels_last),
    }
    if device.type == "cuda":
        chosen[GRAPH] = funcnet_graph
    if compiled:
        # Inductor lays convolutions out in channels_last by itself, so it is handed that.
        chosen["torch.compile"] = functools.partial(
            torch_nn, layout=torch.channels_last, compiler=_compile
        )
    if jax and importlib.util.find_spec("jax"):
        from jax_stax import jax_stax

        chosen["JAX stax, jit"] = jax_stax
    return chosen


def _compile(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)
