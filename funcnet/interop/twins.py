"""The layers whose twin, a module in torch.nn, has the same name, fields and parameters."""

from __future__ import annotations

from torch import nn

from funcnet import layers
from funcnet.interop import blocks
from funcnet.layer import Layer

_IN_BLOCKS = (
    "ChannelAffine",
    "MultiheadAttention",
    "Permute",
    "PositionalEmbedding",
    "Reshape",
    "Select",
)

LAYERS: dict[type[nn.Module], type[Layer]] = {
    **{getattr(nn, name): getattr(layers, name) for name in layers.__all__ if hasattr(nn, name)},
    **{getattr(blocks, name): getattr(layers, name) for name in _IN_BLOCKS},
}
"""The layer of each module."""

MODULES: dict[type[Layer], type[nn.Module]] = {layer: module for module, layer in LAYERS.items()}
"""The module of each layer; of attention, the one that takes x alone."""
