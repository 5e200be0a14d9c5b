"""Saving and loading a large tree, side by side with raw safetensors, in one run.

What both load is compared first. Each round runs every contender once, in turn, so that a slow
moment of the machine meets them all; the figures are medians over the rounds, and ratios of
medians. funcnet does more: a checksum of every bit, and a file that is on the disk when `save`
returns. What these cost is measured too: the same checksum of the same tensors in one thread, and
safetensors with an fsync after it. safetensors' load maps the file into memory and reads nothing.

    python examples/benchmark/checkpoint.py --size-mb 1000
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import funcnet as fn
from funcnet.checkpoint.container import as_bytes

Tensors = dict[str, torch.Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size-mb", type=int, default=1000, help="of the tree (default 1000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    return parser.parse_args()


def trees(size: int) -> dict[str, Tensors]:
    """Trees of `size` bytes: of one tensor, of layers, and of many small tensors."""
    layers = max(1, size // 16_000_000)
    small = max(1, size // 100_000)
    return {
        "one tensor": {"weight": torch.randn(size // 4)},
        f"{layers} layers": {
            f"{i}.{name}": tensor
            for i in range(layers)
            for name, tensor in _layer(size // layers // 4).items()
        },
        f"{small} small tensors": {f"{i}": torch.randn(size // small // 4) for i in range(small)},
    }


def _layer(size: int) -> Tensors:
    return {"weight": torch.randn(size), "bias": torch.randn(511)}


def contenders(tensors: Tensors, folder: Path) -> dict[str, Callable[[], Any]]:
    raw, ours = folder / "raw.safetensors", folder / "funcnet.safetensors"

    def durable_save() -> None:
        save_file(tensors, raw)
        with open(raw, "r+b") as file:
            os.fsync(file.fileno())

    return {
        "checksum": lambda: [zlib.crc32(as_bytes(tensor)) for tensor in tensors.values()],
        "safetensors save": lambda: save_file(tensors, raw),
        "safetensors save, fsync": durable_save,
        "funcnet save": lambda: fn.save(ours, tensors),
        "safetensors load": lambda: load_file(raw),
        "funcnet load": lambda: fn.load(ours),
        "funcnet inspect": lambda: fn.inspect(ours),
    }


def check(run: dict[str, Callable[[], Any]], tensors: Tensors) -> None:
    """Raise AssertionError where what is loaded is not what was saved."""
    for library in ("safetensors", "funcnet"):
        run[f"{library} save"]()
        torch.testing.assert_close(run[f"{library} load"](), tensors, rtol=0, atol=0)


def medians(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, interleaved; a first round that nobody counts warms the caches."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds + 1):
        for name, action in run.items():
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # nobody pays for what another has left to be written
            start = time.perf_counter()
            result = action()
            times[name].append(time.perf_counter() - start)
            del result  # freeing it is not measured
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def report(name: str, seconds: dict[str, float]) -> None:
    print(f"\n{name}")
    for action, median in seconds.items():
        print(f"  {action:<24}{1000 * median:10.1f} ms")
    checksum = seconds["checksum"]
    for ours, raw in [
        ("save", "safetensors save"),
        ("save", "safetensors save, fsync"),
        ("load", "safetensors load"),
    ]:
        ratio = seconds[f"funcnet {ours}"] / (seconds[raw] + checksum)
        print(f"  funcnet {ours} / ({raw} + checksum) = {ratio:.2f}")


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    print(f"{options.size_mb} MB, medians of {options.rounds} rounds, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, tensors in trees(options.size_mb * 10**6).items():
            run = contenders(tensors, Path(folder))
            check(run, tensors)
            report(name, medians(run, options.rounds))


if __name__ == "__main__":
    main()
