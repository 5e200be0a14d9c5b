"""Images in files: gray or RGB, 8 or 16 bits a channel, with or without transparency.

Pillow reads and writes 8 bits. It cuts 16-bit colours to 8 bits, so tifffile and imagecodecs (PNG)
are there for 16 bits.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from denoising.errors import InputError
from funcnet.checkpoint.atomic import replacing

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FORMATS = ["BMP", "JPEG", "PNG", "TIFF", "WEBP"]
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
READ_AS = {"1": "L", "La": "LA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA"}
ORIENTATION = 0x0112
PNG, TIFFS = b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# A user's own images may be large. Pillow refuses twice as many pixels as this.
Image.MAX_IMAGE_PIXELS = 2**29


@dataclass(frozen=True)
class Picture:
    """An image the right way up."""

    pixels: np.ndarray
    """(H, W, C) of uint8 or uint16, C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha)."""
    icc_profile: bytes | None = None
    """The colour profile, which says what colours the numbers are."""


def read(path: Path) -> Picture:
    """Read an image from a file.

    Raises InputError for several pages, for colours that are neither gray nor RGB, and for numbers
    of other than 8 or 16 bits.
    """
    try:
        with path.open("rb") as file:
            head = file.read(25)
        deep_tiff = read_deep_tiff(path) if head[:4] in TIFFS else None
        return deep_tiff or read_by_pillow(path, is_deep=head[:4] == PNG and head[24] == 16)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (
        *(OSError, SyntaxError, ValueError, IndexError, RuntimeError),
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{path}: expected an image, got what cannot be read ({error})") from None


def read_deep_tiff(path: Path) -> Picture | None:
    """A TIFF of 16 bits; None for one of 8. Raises InputError for what Pillow would read in part,
    or refuse without a reason."""
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        if len(file.pages) > 1:
            raise InputError(f"{path}: expected one image, got {len(file.pages)} pages")
        color = getattr(page.photometric, "name", page.photometric)
        if color not in ("MINISBLACK", "MINISWHITE", "PALETTE", "RGB", "YCBCR"):
            raise InputError(f"{path}: expected gray or RGB, got colours of the kind {color}")
        if page.dtype not in ("bool", "uint8", "uint16"):
            raise InputError(f"{path}: expected 8 or 16 bits a channel, got {page.dtype}")
        if page.dtype != "uint16":
            return None
        pixels = page.asarray()
        if color == "MINISWHITE":
            pixels = 65535 - pixels
        if page.axes[0] == "S":  # planes, one a channel
            pixels = pixels.transpose(1, 2, 0)
        orientation, profile = (page.tags.valueof(tag) for tag in (ORIENTATION, 34675))
    return Picture(upright(with_channels(pixels, path), orientation or 1), profile)


def read_by_pillow(path: Path, is_deep: bool) -> Picture:
    """An image of 8 bits, or a PNG of 16, of which Pillow reads all but the pixels."""
    with Image.open(path, formats=FORMATS) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # cameras append previews to a JPEG
            raise InputError(f"{path}: expected one image, got {pages} pages")
        if is_deep:
            pixels = imagecodecs.png_decode(path.read_bytes())
        else:
            mode = READ_AS.get(image.mode, image.mode)
            is_transparent = "transparency" in image.info
            if mode == "P":
                mode = "RGBA" if is_transparent else "RGB"
            elif is_transparent and mode in ("L", "RGB"):
                mode += "A"
            if mode not in MODES.values():
                raise InputError(f"{path}: expected gray or RGB, got colours of the kind {mode}")
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        # Only now: Pillow turns a TIFF itself as it reads it, and forgets the tag.
        orientation = image.getexif().get(ORIENTATION, 1)
        profile = image.info.get("icc_profile")
    return Picture(upright(with_channels(pixels, path), orientation), profile)


def with_channels(pixels: np.ndarray, path: Path) -> np.ndarray:
    """(H, W, C) of (H, W) or (H, W, C)."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] not in MODES:
        raise InputError(f"{path}: expected gray or RGB, got {pixels.shape[2]} channels")
    return pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image turned as Exif's tag Orientation says, 1 to 8, in memory that can be written."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.require(pixels, requirements=["C", "W"])


def write(path: Path, picture: Picture) -> None:
    """Write an image, in the format that the suffix names, whole or not at all."""
    with writing(path) as file:
        encode(file, path, picture)


def check_output(path: Path, picture: Picture) -> None:
    """Raise InputError if the format that the suffix names cannot hold such an image."""
    encode(io.BytesIO(), path, Picture(picture.pixels[:1, :1], picture.icc_profile))


def encode(file: Any, path: Path, picture: Picture) -> None:
    """Write an image to an open file, in the format that the path's suffix names."""
    pixels, profile = picture.pixels, picture.icc_profile
    mode, suffix = MODES[pixels.shape[2]], path.suffix.lower()
    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    if suffix in (".tif", ".tiff"):
        tifffile.imwrite(
            tifffile.FileHandle(file, name=path.name),  # the file itself has no name
            flat,
            photometric="rgb" if mode.startswith("RGB") else "minisblack",
            planarconfig="contig" if flat.ndim == 3 else None,
            extrasamples=["unassalpha"] if mode.endswith("A") else None,
            compression="zlib",
            iccprofile=profile,
            metadata=None,
        )
    elif pixels.dtype == np.uint8:
        try:
            kind = Image.registered_extensions()[suffix]
            options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
            Image.fromarray(flat).save(file, kind, icc_profile=profile, **options)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise InputError(f"{path}: {error}") from None
    elif suffix == ".png":
        write_deep_png(file, flat, profile)
    else:
        raise InputError(f"{path}: expected .png or .tif for 16 bits a channel, got {suffix}")


def write_deep_png(file: BinaryIO, pixels: np.ndarray, profile: bytes | None) -> None:
    """imagecodecs writes no colour profile: its chunk goes between the header and the data."""
    content = memoryview(imagecodecs.png_encode(np.ascontiguousarray(pixels), level=6))
    header = 8 + 25
    file.write(content[:header])
    if profile is not None:
        chunk = b"iCCP" + b"ICC profile\0\0" + zlib.compress(profile)
        file.write(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    file.write(content[header:])


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of the one at `path` once it is whole."""
    try:
        with replacing(path) as unbuffered:
            # A file without a buffer may write a part of what it is given, without an error.
            file = io.BufferedWriter(unbuffered)
            yield file
            file.flush()
            file.detach()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def as_floats(pixels: np.ndarray) -> Tensor:
    """(3, H, W) in [0, 1] of the colours of (H, W, C) integers; gray is three equal channels."""
    colors = pixels[:, :, : colors_of(pixels)]
    scaled = colors.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    return torch.from_numpy(scaled).permute(2, 0, 1).expand(3, -1, -1).contiguous()


def as_integers(colors: Tensor, like: np.ndarray) -> np.ndarray:
    """(H, W, colours) integers of (3, H, W) in [0, 1]. Gray is the mean of the three channels."""
    if colors_of(like) == 1:
        colors = colors.mean(0, keepdim=True)
    most = int(np.iinfo(like.dtype).max)
    return (colors * most).round().clamp(0, most).permute(1, 2, 0).numpy().astype(like.dtype)


def colors_of(pixels: np.ndarray) -> int:
    """The number of channels that are not alpha: 1 or 3."""
    return 3 if pixels.shape[2] >= 3 else 1


def list_pictures(folder: Path) -> list[Path]:
    """The images in a folder by name, without hidden files (macOS leaves `._NAME.png`)."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
