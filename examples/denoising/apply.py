"""The command `apply`: denoise images in files with a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import funcnet as fn
from denoising import command_line
from denoising.errors import InputError, one_line, warn
from denoising.pictures import (
    SUFFIXES,
    as_floats,
    as_integers,
    check_output,
    colors_of,
    list_pictures,
    read,
    write,
)
from denoising.tiles import Denoiser


def apply(options: argparse.Namespace) -> None:
    """Denoise one image, several, or all in a folder.

    Of several, one that cannot be used is passed over with a warning, and the command fails at the
    end.
    """
    denoiser = read_model(options.model, command_line.choose_device(options.device))
    jobs = plan(options.inputs, options.output, options.force)
    failed = 0
    for source, target in jobs:
        try:
            denoise_file(denoiser, source, target)
        except InputError as error:  # noqa: PERF203
            if len(jobs) == 1:
                raise
            warn(one_line(error))
            failed += 1
    if failed:
        raise InputError(f"{failed} of {len(jobs)} images could not be denoised")


def read_model(path: Path, device: torch.device) -> Denoiser:
    """A network that makes an RGB image of an RGB image of the same size."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    net, params = fn.load_model(path, device=device, dtype=torch.float32)
    try:
        return Denoiser.of(net, params)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None


def plan(inputs: list[Path], output: Path, force: bool) -> list[tuple[Path, Path]]:
    """(source, target) of each image. Targets lie in the folder `output` for several images, or
    if there is such a folder. Raises InputError for what is there already, unless told to replace
    it."""
    sources: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        sources += list_pictures(path) if path.is_dir() else [path]
    if not sources:
        raise InputError(f"{inputs[0]}: expected images ({', '.join(sorted(SUFFIXES))}) in it")
    is_folder = output.is_dir() or len(inputs) > 1 or inputs[0].is_dir()
    targets = [output / source.name if is_folder else output for source in sources]
    for target in targets:
        if target.suffix.lower() not in SUFFIXES:
            raise InputError(f"{target}: expected a name that ends in one of {sorted(SUFFIXES)}")
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise InputError(f"{twice}: expected images of different names, got two of this one")
    if not (output if output.is_dir() else output.parent).is_dir():
        raise InputError(f"{output.parent}: no such folder")
    present = [target for target in targets if target.exists()]
    if present and not force:
        more = f", and {len(present) - 1} more" if len(present) > 1 else ""
        raise InputError(f"{present[0]}: is there already{more}; --force replaces it")
    if is_folder:
        output.mkdir(exist_ok=True)
    return list(zip(sources, targets, strict=True))


def denoise_file(denoiser: Denoiser, source: Path, target: Path) -> None:
    picture = read(source)
    check_output(target, picture)
    if denoiser.reach is None:
        warn(f"{source}: denoised in one piece, since the network may see the whole image")
    denoise_in_place(denoiser, picture.pixels, source.name)
    write(target, picture)


def denoise_in_place(denoiser: Denoiser, pixels: np.ndarray, title: str) -> None:
    """Denoise the colours of (H, W, C) integers, and leave their alpha.

    A band of rows is written when the next one is there, which was computed from some of the same
    rows.
    """
    height, width, _ = pixels.shape
    late: list[tuple[slice, np.ndarray]] = []
    with tqdm(total=height, desc=title, unit="row", leave=False) as bar:
        for rows, band in denoiser.bands(lambda window: as_floats(pixels[window]), height, width):
            late.append((rows, as_integers(band, pixels)))
            if len(late) > 1:
                put(pixels, *late.pop(0))
            bar.update(rows.stop - rows.start)
    put(pixels, *late.pop())


def put(pixels: np.ndarray, rows: slice, colors: np.ndarray) -> None:
    pixels[rows, :, : colors_of(pixels)] = colors
