"""Modules that only compose others, turned into the sequence that they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from funcnet.interop.blocks import First, Residual

_ACTIVATIONS: dict[Any, type[nn.Module]] = {F.relu: nn.ReLU, F.gelu: nn.GELU}


def _encoder_layer(module: nn.TransformerEncoderLayer) -> nn.Module:
    """Attention and a network of two linear layers, each with a norm and a skip connection."""
    function: Any = module.activation
    cls = _ACTIVATIONS.get(function)
    if cls is None and not isinstance(function, nn.Module):
        raise ValueError(
            f"{type(module).__name__}: expected activation to be relu, gelu or a module, "
            f"got {function}"
        )
    activation = function if cls is None else cls()
    attention = [module.self_attn, module.dropout1]
    network = [module.linear1, activation, module.dropout, module.linear2, module.dropout2]
    if module.norm_first:
        return nn.Sequential(
            Residual(nn.Sequential(module.norm1, *attention)),
            Residual(nn.Sequential(module.norm2, *network)),
        )
    return nn.Sequential(
        Residual(nn.Sequential(*attention)),
        module.norm1,
        Residual(nn.Sequential(*network)),
        module.norm2,
    )


def _encoder(module: nn.TransformerEncoder) -> nn.Module:
    return nn.Sequential(*module.layers, *([] if module.norm is None else [module.norm]))


UNROLLED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    First: lambda module: module.module,
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
}
"""The function that unrolls a module, as it computes without a mask."""
