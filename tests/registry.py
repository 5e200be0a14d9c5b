"""What the tests that cut across all layers take from the registry."""

import torch
from hypothesis import settings

import funcnet as fn
from funcnet.testing import strategies
from funcnet.testing.registry import REGISTRY, needs_key

LAYERS = list(REGISTRY)
EXAMPLES = [example for row in REGISTRY.values() for example in row.examples]
FLOAT_EXAMPLES = [
    example for row in REGISTRY.values() if row.classes is None for example in row.examples
]
EXAMPLE_IDS = [f"{layer}-{'x'.join(map(str, shape))}" for layer, shape in EXAMPLES]
EVERY_LAYER = strategies.layers() | strategies.networks()


def cases_of(cls, **kwargs):
    """Cases of a class: of networks of any layers for Sequential."""
    layers = strategies.networks() if cls is fn.Sequential else strategies.layers(cls)
    return strategies.cases(layers, **kwargs)


def key_for(layer):
    """A key for a layer that refuses to evaluate without one, else None."""
    return fn.key(11) if needs_key(layer) else None


def budget(examples, **options):
    """Examples a class, under the quick profile; in proportion under another."""
    return settings(max_examples=max(1, settings().max_examples * examples // 30), **options)


def draw_x(layer, shape, dtype=torch.float32, device="cpu"):
    """x of a shape that counts the batch: integers for a layer that takes them."""
    classes = strategies._classes(layer)
    if classes is None:
        return fn.normal(fn.key(4), shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(4)
    return torch.randint(classes, shape, generator=generator, device="cpu").to(device)


def make(layer, shape, batch=2, dtype=torch.float32, device="cpu"):
    """(params, x, grad) of a layer for examples of a shape."""
    params = layer.init(fn.key(3), shape, dtype=dtype, device=device)
    x = draw_x(layer, (batch, *shape), dtype, device)
    out = (batch, *layer.out_shape(shape))
    return params, x, fn.normal(fn.key(5), out, dtype=dtype, device=device)
