"""Layers with a key or integers, and losses, beside torch.nn: what `--only layers` leaves out.

A row is forward and backward, and for layers the forward pass alone. What both compute is compared
first, but for dropout, whose masks are others. Contenders run in turns; ratios are of medians.

    python examples/benchmark/more_layers.py           half a minute
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from contenders import laid_out
from timing import duration, side_by_side
from torch import Tensor, nn
from translate import leaves

import funcnet as fn

KEY = fn.key(0)


class Row(NamedTuple):
    """One computation, as funcnet and as torch.nn have it. Each returns what both must agree on."""

    name: str
    ours: Callable[[], list[Tensor]]
    theirs: Callable[[], list[Tensor]]
    is_random: bool = False


def rows(scale: int = 8) -> Iterator[Row]:
    """The rows of all layers and losses; `scale` is the batch over 2."""
    n = 2 * scale
    image = laid_out(_normal(n, 64, 32, 32), torch.channels_last)
    yield from _layer("batch norm", fn.BatchNorm(), nn.BatchNorm2d(64), image)
    yield from _layer("dropout", fn.Dropout(0.1), nn.Dropout(0.1), _normal(n, 64, 512))
    yield from _layer("dropout of channels", fn.Dropout2d(0.1), nn.Dropout2d(0.1), image)
    words = fn.permutation(KEY, 1000)[: 64 * n].remainder(100).expand(n, -1)
    yield from _layer("embedding 1000×128", fn.Embedding(1000, 128), nn.Embedding(1000, 128), words)
    noise, picture = _normal(4 * n, 3, 32, 32), _normal(4 * n, 3, 32, 32, seed=1)
    yield _loss("mean squared error", fn.MSE(), nn.MSELoss(), noise, picture)
    yield _loss("mean absolute error", fn.L1(), nn.L1Loss(), noise, picture)
    yield _loss("Huber", fn.Huber(), nn.HuberLoss(), noise, picture)
    shares = picture.sigmoid()
    yield _loss("cross-entropy of 2", fn.BCEWithLogits(), nn.BCEWithLogitsLoss(), noise, shares)
    for classes in (10, 1000):
        name, label = f"cross-entropy of {classes}", torch.arange(8 * n) % classes
        logits = _normal(8 * n, classes)
        yield _loss(name, fn.CrossEntropy(), nn.CrossEntropyLoss(), logits, label)
    name, labels = "cross-entropy of pixels", (picture[:, 0] > 0).long()
    yield _loss(name, fn.CrossEntropy(), nn.CrossEntropyLoss(), noise, labels)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return fn.normal(fn.key(seed), shape)


def _layer(name: str, layer: fn.Layer, module: nn.Module, x: Tensor) -> Iterator[Row]:
    params = layer.init(KEY, x.shape[1:])
    weights = list(module.parameters())
    with torch.no_grad():
        for slot, weight in zip(weights, leaves(params), strict=True):
            slot.copy_(weight)
    # Normalisation's gradient for x is 0 where that for y is the same everywhere.
    grad = torch.randn_like(layer.apply(params, x, key=KEY))
    leaf = [x.clone().requires_grad_()] if x.is_floating_point() else []

    def ours() -> list[Tensor]:
        y, residuals = layer.fwd(params, x, key=KEY)
        dparams, dx = layer.bwd(params, residuals, grad)
        return [y, *([] if dx is None else [dx]), *leaves(dparams)]

    def theirs() -> list[Tensor]:
        y = module(leaf[0] if leaf else x)
        return [y.detach(), *torch.autograd.grad(y, [*leaf, *weights], grad)]

    def predicted() -> list[Tensor]:
        with torch.inference_mode():
            return [module(x)]

    is_random = "dropout" in name
    yield Row(name, ours, theirs, is_random)
    yield Row(f"{name}, forward", lambda: [layer.apply(params, x, key=KEY)], predicted, is_random)


def _loss(name: str, loss: fn.Loss, module: nn.Module, x: Tensor, target: Tensor) -> Row:
    leaf = x.clone().requires_grad_()

    def ours() -> list[Tensor]:
        value, residuals = loss.fwd(x, target)
        return [value, loss.bwd(residuals)]

    def theirs() -> list[Tensor]:
        value = module(leaf, target)
        return [value.detach(), *torch.autograd.grad(value, leaf)]

    return Row(name, ours, theirs)


def check(row: Row) -> None:
    """Raise AssertionError where the two do not agree."""
    if not row.is_random:
        torch.testing.assert_close(row.ours(), row.theirs(), rtol=1e-4, atol=1e-4)


def timed(row: Row, seconds: float) -> str:
    """The row as a line of a table."""
    device = torch.device("cpu")
    clocks: dict[str, Any] = {
        name: functools.partial(duration, function, device=device)
        for name, function in (("ours", row.ours), ("theirs", row.theirs))
    }
    times = side_by_side(clocks, seconds)
    ours, theirs = times["ours"].median, times["theirs"].median
    return f"| {row.name} | {ours * 1e3:.3g} ms | {theirs * 1e3:.3g} ms | {theirs / ours:.2f}× |"


def main() -> None:
    print_table(__doc__, "| layer or loss | funcnet | torch.nn | ratio |", rows())


def print_table(doc: str, head: str, rows: Iterable[Row]) -> None:
    """Check the rows and print their times, as the command's arguments say; `doc` is its help."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--threads", default=2, type=int, help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", default=0.5, type=float, help="a contender (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{head}\n| --- | ---: | ---: | ---: |")
    for row in rows:
        check(row)
        print(timed(row, options.seconds), flush=True)


if __name__ == "__main__":
    main()
