"""One table of layers that drives every property that cuts across them.

A new layer is one new row: examples worth trying every time, with shapes that fit, and the strategy
that draws any. `test_properties.py` fails for a layer of funcnet that has no row.
"""

from dataclasses import dataclass

import funcnet as fn
from funcnet.layer import Layer, Shape
from funcnet.testing import strategies
from funcnet.testing.strategies import Strategy


@dataclass(frozen=True)
class Row:
    strategy: Strategy[Layer]
    examples: tuple[tuple[Layer, Shape], ...]


REGISTRY: dict[type[Layer], Row] = {
    fn.Conv2d: Row(
        strategies.conv2d(),
        (
            (fn.Conv2d(4, 2, stride=2), (3, 8, 6)),  # patches that do not overlap
            (fn.Conv2d(4, 2, stride=2, bias=False), (3, 5, 7)),  # with a remainder
            (fn.Conv2d(6, (3, 2), stride=(2, 1), padding=(1, 3), dilation=2, groups=3), (3, 9, 5)),
            (fn.Conv2d(6, (3, 2), padding="same", groups=2, method="unfold"), (4, 5, 4)),
            (fn.Conv2d(2, 4, padding="same", dilation=3), (1, 4, 5)),
        ),
    ),
    fn.Upsample2d: Row(
        strategies.upsample2d(),
        (
            (fn.Upsample2d(2), (3, 4, 5)),
            (fn.Upsample2d((1, 3)), (2, 3, 2)),
            (fn.Upsample2d(1), (2, 3, 2)),
            (fn.Upsample2d(2), (1, 1, 1)),  # where expanding alone would do
        ),
    ),
    fn.UpsampleConv2d: Row(
        strategies.upsample_conv2d(),
        (
            (fn.UpsampleConv2d(3), (4, 4, 5)),
            (fn.UpsampleConv2d(20, bias=False), (2, 3, 2)),
            (fn.UpsampleConv2d(2, (4, 1), scale=(3, 2), padding=(0, 2)), (3, 2, 4)),
            (fn.UpsampleConv2d(2, 2, scale=1, padding="valid"), (3, 3, 3)),
            (fn.UpsampleConv2d(2, (2, 5), scale=3, method="unfold"), (2, 2, 3)),
        ),
    ),
    fn.ReLU: Row(strategies.activations(), ((fn.ReLU(), (3, 4, 5)), (fn.ReLU(), (4,)))),
    fn.Sigmoid: Row(strategies.activations(), ((fn.Sigmoid(), (3, 4, 5)), (fn.Sigmoid(), (4,)))),
    fn.Sequential: Row(
        strategies.networks(),
        (
            (fn.Sequential(), (3, 4)),
            (fn.Sequential(fn.ReLU(), fn.Sequential(fn.Sigmoid(), fn.Sequential())), (3, 2)),
            (
                fn.Sequential(
                    fn.Conv2d(4, 2, stride=2),
                    fn.ReLU(),
                    fn.Sequential(fn.Conv2d(6, 2, stride=2), fn.ReLU()),
                    fn.UpsampleConv2d(4),
                    fn.ReLU(),
                    fn.UpsampleConv2d(3),
                    fn.Sigmoid(),
                ),
                (3, 8, 8),
            ),
            (fn.Sequential(fn.Upsample2d(2), fn.ReLU(), fn.Conv2d(2, 3), fn.ReLU()), (1, 2, 2)),
            (fn.Sequential(fn.UpsampleConv2d(16, bias=False), fn.Sigmoid()), (2, 2, 3)),
        ),
    ),
}

EXAMPLES = [example for row in REGISTRY.values() for example in row.examples]
EXAMPLE_IDS = [f"{layer}-{'x'.join(map(str, shape))}" for layer, shape in EXAMPLES]
EVERY_LAYER = strategies.layers() | strategies.networks()
