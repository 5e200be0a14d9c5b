"""The networks of the benchmark: whole networks that are trained, and layers on their own."""

from __future__ import annotations

from dataclasses import dataclass

import funcnet as fn

MEASURED = ("denoiser", 64)
"""The network and batch size at which memory and arithmetic are looked at, too."""


@dataclass(frozen=True)
class Network:
    """A network, the shape (C, H, W) of its examples, and the batch sizes to time it at."""

    name: str
    net: fn.Sequential
    shape: tuple[int, int, int]
    batches: tuple[int, ...]
    quick_batches: tuple[int, ...]
    is_layer: bool = False
    """Timed as a layer between others: forward, and backward to x too; no loss, no update."""


def all_networks() -> tuple[Network, ...]:
    """The whole set, in the order of the report."""
    return (
        Network("denoiser", denoiser(), (3, 32, 32), (1, 4, 16, 64, 256), (1, 64)),
        Network("vgg", vgg(), (3, 32, 32), (1, 16), (4,)),
        Network("thin", thin(), (3, 16, 16), (1, 16), (4,)),
        Network("decoder", decoder(), (128, 4, 4), (1, 16), (4,)),
        _layer("conv 3×3 64→64", fn.Conv2d(64, 3, padding=1), (64, 32, 32), 16),
        _layer("conv 2×2/2 128→256", fn.Conv2d(256, 2, stride=2), (128, 16, 16), 64),
        _layer("upsample-conv 256→128", fn.UpsampleConv2d(128), (256, 8, 8), 64),
        _layer("upsample-conv 128→3", fn.UpsampleConv2d(3), (128, 16, 16), 64),
        _layer("upsample ×2", fn.Upsample2d(2), (128, 16, 16), 64),
        _layer("relu", fn.ReLU(), (128, 16, 16), 64),
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
    """3×3 convolutions with no upsampling, some of stride 2 in the place of pooling."""
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
    """From 4×4 to 64×64 pixels by upsampling by 4, twice."""
    return fn.Sequential(
        fn.UpsampleConv2d(64, scale=4), fn.ReLU(), fn.UpsampleConv2d(3, scale=4), fn.Sigmoid()
    )


def _layer(name: str, layer: fn.Layer, shape: tuple[int, int, int], batch: int) -> Network:
    return Network(name, fn.Sequential(layer), shape, (batch,), (batch,), is_layer=True)
