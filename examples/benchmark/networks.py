"""The networks of the benchmark: whole networks that are trained, and layers on their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import funcnet as fn

LEARNING_RATE = 0.01
MOMENTUM = 0.9
SGD = fn.SGD(LEARNING_RATE, MOMENTUM)
MSE = fn.MSE()

MEASURED = ("denoiser", 64)
"""The network and batch size at which memory and arithmetic are looked at, too."""


@dataclass(frozen=True)
class Network:
    """A network, the shape of one example, and the batch sizes to time it at."""

    name: str
    net: fn.Sequential
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    quick_batches: tuple[int, ...]
    is_layer: bool = False
    """Timed as a layer between others: forward, and backward to x too; no loss, no update."""
    loss: fn.MSE | fn.CrossEntropy = MSE
    optimizer: fn.SGD | fn.Adam = SGD
    gain: float = 6**0.5
    """The factor by which weights start larger than `init` draws them. √6 is of a scale that no
    depth of convolutions and ReLU makes vanish (He et al., 2015)."""


def all_networks() -> tuple[Network, ...]:
    """The whole set, in the order of the report."""
    return (
        Network("denoiser", denoiser(), (3, 32, 32), (1, 4, 16, 64, 256), (1, 64)),
        Network("vgg", vgg(), (3, 32, 32), (1, 16), (4,)),
        Network("thin", thin(), (3, 16, 16), (1, 16), (4,)),
        Network("decoder", decoder(), (128, 4, 4), (1, 16), (4,)),
        _network("mlp", mlp(), (784,), 128, loss=fn.CrossEntropy(), optimizer=fn.Adam()),
        _network("resnet", resnet(), (3, 32, 32), 32, loss=fn.CrossEntropy()),
        _network("unet", unet(), (3, 64, 64), 8),
        _network("transformer", transformer(), (64, 128), 16),
        _network("lstm", lstm(), (64, 128), 32, loss=fn.CrossEntropy()),
        *_layers(),
    )


def _network(
    name: str, net: fn.Sequential, shape: tuple[int, ...], batch: int, **options: Any
) -> Network:
    """A network at the batch size that is usual for it, as `init` draws it."""
    return Network(name, net, shape, (batch,), (batch,), gain=1.0, **options)


def _layers() -> tuple[Network, ...]:
    """Single layers, at sizes that are ordinary for each family."""
    image, images = (64, 32, 32), 16
    return (
        _layer("conv 3×3 64→64", fn.Conv2d(64, 3, padding=1), (64, 32, 32), 16),
        _layer("conv 2×2/2 128→256", fn.Conv2d(256, 2, stride=2), (128, 16, 16), 64),
        _layer("upsample-conv 256→128", fn.UpsampleConv2d(128), (256, 8, 8), 64),
        _layer("upsample-conv 128→3", fn.UpsampleConv2d(3), (128, 16, 16), 64),
        _layer("upsample ×2", fn.Upsample2d(2), (128, 16, 16), 64),
        _layer("relu", fn.ReLU(), (128, 16, 16), 64),
        _layer("linear 512→512", fn.Linear(512), (512,), 128),
        _layer("conv1d 5 64→64", fn.Conv1d(64, 5, padding=2), (64, 256), 16),
        _layer("conv3d 3³ 16→16", fn.Conv3d(16, 3, padding=1), (16, 16, 16, 16), 4),
        _layer("depthwise 3×3 64", fn.Conv2d(64, 3, padding=1, groups=64), image, images),
        _layer(
            "conv-transpose 4×4/2 64→32", fn.ConvTranspose2d(32, 4, stride=2, padding=1), image, 4
        ),
        _layer("pixel-shuffle ×2", fn.PixelShuffle(2), image, images),
        _layer("max-pool 2×2", fn.MaxPool2d(2), image, images),
        _layer("avg-pool 2×2", fn.AvgPool2d(2), image, images),
        _layer("adaptive avg-pool 1", fn.AdaptiveAvgPool2d(1), image, images),
        _layer("adaptive max-pool 4", fn.AdaptiveMaxPool2d(4), image, images),
        _layer("sigmoid", fn.Sigmoid(), image, images),
        _layer("gelu", fn.GELU(), (64, 512), 16),
        _layer("silu", fn.SiLU(), image, images),
        _layer("softplus", fn.Softplus(), image, images),
        _layer("PReLU", fn.PReLU(), image, images),
        _layer("softmax", fn.Softmax(-1), (64, 512), 16),
        _layer("layer norm", fn.LayerNorm(), (64, 512), 16),
        _layer("rms norm", fn.RMSNorm(), (64, 512), 16),
        _layer("group norm 8", fn.GroupNorm(8), image, images),
        _layer("instance norm", fn.InstanceNorm(affine=True), image, images),
        _layer("attention E=128", fn.MultiheadAttention(4), (64, 128), 16),
        _layer("rnn H=128", fn.RNN(128), (64, 128), 32),
        _layer("lstm layer H=128", fn.LSTM(128), (64, 128), 32),
        _layer("gru H=128", fn.GRU(128), (64, 128), 32),
    )


def denoiser() -> fn.Sequential:
    """The Noise2Noise denoiser: down by patch convolutions, up by nearest upsampling."""
    return fn.Sequential(
        fn.Conv2d(128, 2, stride=2),
        fn.ReLU(),
        fn.Conv2d(256, 2, stride=2),
        fn.ReLU(),
        fn.UpsampleConv2d(128),
        fn.ReLU(),
        fn.UpsampleConv2d(3),
        fn.Sigmoid(),
    )


def vgg() -> fn.Sequential:
    """3×3 convolutions with no upsampling, some of stride 2 instead of pooling."""
    layers: list[fn.Layer] = []
    for channels, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        layers += [fn.Conv2d(channels, 3, stride=stride, padding=1), fn.ReLU()]
    return fn.Sequential(*layers, fn.Conv2d(10, 1))


def thin() -> fn.Sequential:
    """24 layers of 8 channels: little arithmetic, so that the cost of each call counts."""
    layers: list[fn.Layer] = []
    for _ in range(24):
        layers += [fn.Conv2d(8, 3, padding=1), fn.ReLU()]
    return fn.Sequential(*layers)


def decoder() -> fn.Sequential:
    """A decoder from 4×4 to 64×64 pixels, by upsampling by 4, twice."""
    return fn.Sequential(
        fn.UpsampleConv2d(64, scale=4), fn.ReLU(), fn.UpsampleConv2d(3, scale=4), fn.Sigmoid()
    )


def mlp() -> fn.Sequential:
    """784-512-512-10, the first network of many courses."""
    return fn.Sequential(fn.Linear(512), fn.ReLU(), fn.Linear(512), fn.ReLU(), fn.Linear(10))


def resnet() -> fn.Sequential:
    """Three stages of two residual blocks, with group normalisation, down to 8×8 pixels."""
    layers: list[fn.Layer] = [fn.Conv2d(32, 3, padding=1)]
    for channels, stride in ((32, 1), (64, 2), (128, 2)):
        if stride > 1:
            layers.append(fn.Conv2d(channels, 2, stride=2))
        layers += [block for _ in range(2) for block in (_residual(channels), fn.ReLU())]
    return fn.Sequential(*layers, fn.AdaptiveAvgPool2d(1), fn.Flatten(), fn.Linear(10))


def _residual(channels: int) -> fn.Layer:
    convs = [fn.Conv2d(channels, 3, padding=1) for _ in range(2)]
    norm = fn.GroupNorm(8)
    return fn.Residual(fn.Sequential(convs[0], norm, fn.ReLU(), convs[1], norm))


def unet() -> fn.Sequential:
    """Three levels, 64×64 to 16×16 pixels."""
    inner = _pair(64)
    for channels in (32, 16):
        down, up = fn.Sequential(fn.MaxPool2d(2), inner), fn.Upsample2d(2)
        skip = fn.Concat(fn.Identity(), fn.Sequential(down, up))
        inner = fn.Sequential(_pair(channels), skip, _pair(channels))
    return fn.Sequential(inner, fn.Conv2d(3, 1))


def _pair(channels: int) -> fn.Sequential:
    layers = [layer for _ in range(2) for layer in (fn.Conv2d(channels, 3, padding=1), fn.ReLU())]
    return fn.Sequential(*layers)


def transformer(width: int = 128, depth: int = 4) -> fn.Sequential:
    """Four layers of attention and two-layer networks, normalised before each."""
    layers: list[fn.Layer] = []
    for _ in range(depth):
        wide = fn.Sequential(fn.LayerNorm(), fn.Linear(4 * width), fn.GELU(), fn.Linear(width))
        attention = fn.Sequential(fn.LayerNorm(), fn.MultiheadAttention(4))
        layers += [fn.Residual(attention), fn.Residual(wide)]
    return fn.Sequential(*layers, fn.LayerNorm())


def lstm() -> fn.Sequential:
    """A classifier of sequences."""
    return fn.Sequential(fn.LSTM(128), fn.Select(1, -1), fn.Linear(10))


def _layer(name: str, layer: fn.Layer, shape: tuple[int, ...], batch: int) -> Network:
    return Network(name, fn.Sequential(layer), shape, (batch,), (batch,), is_layer=True)
