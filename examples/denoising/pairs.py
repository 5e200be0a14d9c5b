"""A user's own noisy pairs: two shots of each scene, in two folders, under the same names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import funcnet as fn
from denoising.data import Data, patches_of, read_photograph
from denoising.errors import InputError
from denoising.pictures import SUFFIXES, list_pictures

Pair = tuple[Path, Path]


def pair_data(folders: tuple[Path, Path], count: int, key: fn.Key) -> Data:
    """Patches of both shots from the same places. Every tenth pair by name is held out."""
    pairs = match(*folders)
    training = [pair for i, pair in enumerate(pairs) if i % 10]
    held_out = pairs[::10]
    keys = fn.split(key)
    # Scaling an image down would average its noise away: patches are cut at full size.
    first, second = patches_of(training, read_pair, count, keys[0], (1,)).chunk(2, dim=1)
    held_out_patches = patches_of(held_out, read_pair, max(1, count // 10), keys[1], (1,))
    held_out_first, held_out_second = held_out_patches.chunk(2, dim=1)
    noisy, target = read_pair(held_out[0]).chunk(2)
    return Data(
        noisy=first.contiguous(),
        target=second.contiguous(),
        held_out_noisy=held_out_first.contiguous(),
        held_out_target=held_out_second.contiguous(),
        photograph=(noisy, target),
        title=f"{len(held_out_patches)} held-out patches of {', '.join(p.name for p in folders)}",
        is_clean=False,
    )


def match(first: Path, second: Path) -> list[Pair]:
    """The images of both folders whose names are the same but for the suffix."""
    by_stem = [stems(folder) for folder in (first, second)]
    names, others = (set(found) for found in by_stem)
    for folder, missing in ((second, names - others), (first, others - names)):
        if missing:
            raise InputError(
                f"{folder}: expected the other shot of each image, "
                f"lacking {len(missing)} ({', '.join(sorted(missing)[:3])})"
            )
    if len(names) < 2:
        raise InputError(
            f"{first}: expected at least 2 images ({', '.join(sorted(SUFFIXES))}), "
            f"one of which is held out, got {len(names)}"
        )
    return [(by_stem[0][name], by_stem[1][name]) for name in sorted(names)]


def stems(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_pictures(folder):
        if path.stem in found:
            raise InputError(f"{path}: expected one image a name, got {found[path.stem].name} too")
        found[path.stem] = path
    return found


def read_pair(pair: Pair) -> Tensor:
    """(6, H, W): the first shot, then the second."""
    first, second = (read_photograph(path) for path in pair)
    if first.shape != second.shape:
        sizes = [f"{shot.shape[2]}×{shot.shape[1]}" for shot in (first, second)]
        raise InputError(f"{pair[1]}: expected the size of {pair[0]}, {sizes[0]}, got {sizes[1]}")
    return torch.cat([first, second])
