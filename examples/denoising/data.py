"""The data to learn from and to measure by: photographs, or tensors in files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

import funcnet as fn
from denoising.errors import InputError
from denoising.noise import Noise
from denoising.pictures import SUFFIXES, as_floats, list_pictures, read

PATCH = 32
SCALES = (1, 2, 3)  # a photograph at its own size, at a half and at a third of it
HELD_OUT = ["astronaut"]
PHOTOGRAPHS = [
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
]

Reader: TypeAlias = Callable[[Any], Tensor]
"""A function from a name or a path to a photograph, (3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Data:
    """Pairs to learn from, and held-out pairs to measure by: (N, 3, H, W), floats or uint8."""

    noisy: Tensor
    target: Tensor
    held_out_noisy: Tensor
    held_out_target: Tensor
    photograph: tuple[Tensor, Tensor] | None
    """A whole held-out photograph, (noisy, target)."""
    title: str
    is_clean: bool = True
    """Whether the held-out targets are clean images."""

    def checksum(self) -> str:
        total = 0
        for tensor in (self.noisy, self.target, self.held_out_noisy, self.held_out_target):
            total = zlib.crc32(tensor.contiguous().numpy().data, total)
        return f"{total:08x}"


def bundled(name: str) -> Tensor:
    """A photograph that comes with scikit-image: no network is needed."""
    picture = getattr(skimage.data, name)()
    # The stereo pair comes as (left, right, disparity).
    return as_floats(picture[0] if isinstance(picture, tuple) else picture)


def read_photograph(path: Path) -> Tensor:
    """A photograph from a file, large enough to cut a patch from."""
    picture = as_floats(read(path).pixels)
    height, width = picture.shape[1:]
    if min(height, width) < PATCH:
        raise InputError(
            f"{path}: expected an image of at least {PATCH}×{PATCH}, got {width}×{height}"
        )
    return picture


def list_photographs(folder: Path) -> tuple[list[Path], list[Path]]:
    """(to train on, held out): every tenth by name is held out."""
    paths = list_pictures(folder)
    if len(paths) < 2:
        raise InputError(
            f"{folder}: expected at least 2 images ({', '.join(sorted(SUFFIXES))}), "
            f"one of which is held out, got {len(paths)}"
        )
    return [path for i, path in enumerate(paths) if i % 10], paths[::10]


def cut_patches(picture: Tensor, count: int, key: fn.Key, scales: Sequence[int] = SCALES) -> Tensor:
    """(count, C, 32, 32) of (C, H, W), from random places, shared evenly between the scales at
    which the image is large enough."""
    scaled = [F.avg_pool2d(picture, s) for s in scales if min(picture.shape[1:]) >= s * PATCH]
    patches = []
    for i, image in enumerate(scaled):
        windows = image.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # (C, rows, columns, 32, 32)
        share = len(range(i, count, len(scaled)))
        place = fn.uniform(fn.fold_in(key, i), (share, 2), dtype=torch.float64)
        top, left = (place * torch.tensor(windows.shape[1:3])).long().unbind(1)
        patches.append(windows[:, top, left].transpose(0, 1))
    return torch.cat(patches)


def patches_of(
    pictures: Sequence[Any],
    read: Reader,
    count: int,
    key: fn.Key,
    scales: Sequence[int] = SCALES,
) -> Tensor:
    """`count` patches, shared evenly between the images, which are read one at a time."""
    shares = [len(range(i, count, len(pictures))) for i in range(len(pictures))]
    return torch.cat(
        [
            cut_patches(read(picture), share, fn.fold_in(key, i), scales)
            for i, (picture, share) in enumerate(zip(pictures, shares, strict=True))
        ]
    )


def photograph_data(folder: Path | None, noise: Noise, count: int, key: fn.Key) -> Data:
    """Two noisy copies of `count` patches, and a tenth as many held-out patches."""
    training: Sequence[Any] = PHOTOGRAPHS
    held_out: Sequence[Any] = HELD_OUT
    read: Reader = bundled
    if folder is not None:
        training, held_out = list_photographs(folder)
        read = read_photograph
    keys = fn.split(key, 6)
    clean = patches_of(training, read, count, keys[0])
    held_out_clean = patches_of(held_out, read, max(1, count // 10), keys[1])
    whole = read(held_out[0])
    return Data(
        noisy=noise.add(clean, keys[2]).clamp(0, 1),
        target=noise.add(clean, keys[3]),
        held_out_noisy=noise.add(held_out_clean, keys[4]).clamp(0, 1),
        held_out_target=held_out_clean,
        photograph=(noise.add(whole, keys[5]).clamp(0, 1), whole),
        title=f"{len(held_out_clean)} held-out patches with {noise}",
    )


def file_data(train: Path, val: Path, stride: int) -> Data:
    """Data that `torch.save` wrote: pairs (noisy, noisy) to train on, (noisy, clean) held out."""
    noisy, target = read_tensors(train, stride)
    held_out_noisy, held_out_clean = read_tensors(val, stride)
    title = f"the {len(held_out_clean)} images of {val.name}"
    return Data(noisy, target, held_out_noisy, held_out_clean, None, title)


def read_tensors(path: Path, stride: int) -> tuple[Tensor, Tensor]:
    """A pair of uint8 tensors (N, 3, H, W) of one shape, H and W multiples of the stride."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        pair = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling other bytes may raise anything
        raise InputError(
            f"{path}: expected a file that torch.load(weights_only=True) reads, "
            f"got {type(error).__name__}"
        ) from None
    expected = f"{path}: expected a pair of uint8 tensors (N, 3, H, W)"
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise InputError(f"{expected}, got {type(pair).__name__}")
    for tensor in pair:
        if not isinstance(tensor, Tensor):
            raise InputError(f"{expected}, got {type(tensor).__name__} in it")
        if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[1] != 3:
            raise InputError(f"{expected}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    first, second = (tensor.contiguous() for tensor in pair)
    if first.shape != second.shape or len(first) == 0:
        raise InputError(
            f"{expected} of one shape, N ≥ 1, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if any(size < stride or size % stride for size in first.shape[2:]):
        raise InputError(
            f"{expected} with H and W multiples of {stride}, got shape {tuple(first.shape)}"
        )
    return first, second


def scaled(pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Floats in [0, 1] of bytes; floats as they are."""
    pictures = pictures.to(device)
    return pictures / 255 if pictures.dtype == torch.uint8 else pictures
