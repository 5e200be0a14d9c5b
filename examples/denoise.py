"""Noise2Noise: train a denoiser that never sees a clean picture, then use it.

    python examples/denoise.py                                 # on scikit-image's photographs
    python examples/denoise.py --images FOLDER                 # on your own
    python examples/denoise.py --data train.pkl --val val.pkl  # on pairs of noisy pictures
    python examples/denoise.py --resume                        # after a kill: on to the same bits
    python examples/denoise.py apply runs/denoise/denoiser.safetensors IN.png OUT.png

Every patch x is seen only through two noisy copies: a = x + noise is what the network f is given,
b = x + other noise is its target. The noise of b has mean zero and is independent of a, so

    E‖f(a) − b‖² = E‖f(a) − x‖² + E‖b − x‖²,

whose last term does not depend on f: the f that comes nearest to b is the one that comes nearest to
x (Lehtinen et al., "Noise2Noise: Learning image restoration without clean data", ICML 2018). That
is why a may be clipped to what a picture file can hold, [0, 1], but b may not: clipping would move
the mean of its noise away from zero.

Training leaves in --out: denoiser.safetensors (network and parameters of the best epoch),
pictures.png, curves.png, history.csv and checkpoints/. It replaces those of an earlier run, unless
something is wrong with the input: that is refused before anything is written.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import optree
import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from skimage.restoration import denoise_nl_means
from torch import Tensor
from tqdm import tqdm

import funcnet as fn

# --- Data: clean photographs are (3, H, W) tensors in [0, 1]

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
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


Reader: TypeAlias = Callable[[Any], Tensor]
Tree: TypeAlias = Any  # nested tuples and dicts of tensors


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line."""


@dataclass(frozen=True)
class Data:
    """Pairs to learn from, and held-out pictures to measure by: (N, 3, H, W), floats or uint8."""

    noisy: Tensor
    target: Tensor
    held_out_noisy: Tensor
    held_out_clean: Tensor
    photograph: tuple[Tensor, Tensor] | None
    """A whole held-out photograph, (noisy, clean)."""
    title: str


def bundled(name: str) -> Tensor:
    """A photograph that comes with scikit-image: no network is needed."""
    picture = getattr(skimage.data, name)()
    # The stereo pair comes as (left, right, disparity).
    return as_tensor(picture[0] if isinstance(picture, tuple) else picture)


def as_tensor(picture: Any) -> Tensor:
    """(3, H, W) in [0, 1] of an (H, W, 3) picture of bytes."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() / 255


def open_picture(path: Path) -> Image.Image:
    """A picture of at most 8 bits a channel, the right way up."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: expected a picture, got what cannot be read ({error})") from None
    if image.mode[0] in "IF":
        raise InputError(f"{path}: expected 8 bits a channel, got a picture of mode {image.mode}")
    return ImageOps.exif_transpose(image)


def read_photograph(path: Path) -> Tensor:
    """A photograph from a file, large enough to cut a patch from."""
    picture = as_tensor(open_picture(path).convert("RGB"))
    height, width = picture.shape[1:]
    if min(height, width) < PATCH:
        raise InputError(
            f"{path}: expected a picture of at least {PATCH}×{PATCH}, got {width}×{height}"
        )
    return picture


def list_photographs(folder: Path) -> tuple[list[Path], list[Path]]:
    """(to train on, held out): every tenth by name is held out."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise InputError(
            f"{folder}: expected at least 2 pictures ({', '.join(sorted(SUFFIXES))}), "
            f"one of which is held out, got {len(paths)}"
        )
    return [path for i, path in enumerate(paths) if i % 10], paths[::10]


def cut_patches(picture: Tensor, count: int, key: fn.Key) -> Tensor:
    """(count, 3, 32, 32), from random places, shared evenly between the possible scales."""
    scaled = [F.avg_pool2d(picture, s) for s in SCALES if min(picture.shape[1:]) >= s * PATCH]
    patches = []
    for i, image in enumerate(scaled):
        windows = image.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # (3, rows, columns, 32, 32)
        share = len(range(i, count, len(scaled)))
        place = fn.uniform(fn.fold_in(key, i), (share, 2), dtype=torch.float64)
        top, left = (place * torch.tensor(windows.shape[1:3])).long().unbind(1)
        patches.append(windows[:, top, left].transpose(0, 1))
    return torch.cat(patches)


def patches_of(pictures: Sequence[Any], read: Reader, count: int, key: fn.Key) -> Tensor:
    """`count` patches, shared evenly between the pictures, which are read one at a time."""
    shares = [len(range(i, count, len(pictures))) for i in range(len(pictures))]
    return torch.cat(
        [
            cut_patches(read(picture), share, fn.fold_in(key, i))
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
        held_out_clean=held_out_clean,
        photograph=(noise.add(whole, keys[5]).clamp(0, 1), whole),
        title=f"{len(held_out_clean)} held-out patches with {noise}",
    )


def file_data(train: Path, val: Path) -> Data:
    """What `torch.save` wrote: pairs (noisy, noisy) to train on, (noisy, clean) held out."""
    noisy, target = read_pair(train)
    held_out_noisy, held_out_clean = read_pair(val)
    title = f"the {len(held_out_clean)} pictures of {val.name}"
    return Data(noisy, target, held_out_noisy, held_out_clean, None, title)


def read_pair(path: Path) -> tuple[Tensor, Tensor]:
    """A pair of uint8 tensors (N, 3, H, W) of one shape that the denoiser keeps."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        pair = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling what is no pickle may raise anything
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
    if any(size < STRIDE or size % STRIDE for size in first.shape[2:]):
        raise InputError(
            f"{expected} with H and W multiples of {STRIDE}, got shape {tuple(first.shape)}"
        )
    return first, second


# --- Noise

DEFAULT_LEVELS = {"gaussian": 25.0, "poisson": 30.0}


@dataclass(frozen=True)
class Noise:
    """Noise of mean zero: Gaussian of σ = level/255, or Poisson with `level` photons at white."""

    kind: str
    level: float

    def add(self, clean: Tensor, key: fn.Key) -> Tensor:
        """A noisy copy, not clipped."""
        if self.kind == "gaussian":
            return clean + fn.normal(key, clean.shape, std=self.level / 255)
        photons = np.random.Generator(np.random.Philox(key=key.data)).poisson(clean * self.level)
        return torch.from_numpy(photons).float() / self.level

    def __str__(self) -> str:
        if self.kind == "gaussian":
            return f"Gaussian noise, σ = {self.level:g}/255"
        return f"Poisson noise, {self.level:g} photons at white"


# --- The network

DENOISER = fn.Sequential(
    fn.Conv2d(128, 2, stride=2),
    fn.ReLU(),
    fn.Conv2d(256, 2, stride=2),
    fn.ReLU(),
    fn.UpsampleConv2d(128),
    fn.ReLU(),
    fn.UpsampleConv2d(3),
    fn.Sigmoid(),
)
STRIDE = 4  # the sizes of pictures that the denoiser keeps are multiples of this


# --- Training


@fn.register_node
class Progress(NamedTuple):
    """All that training carries from step to step; a checkpoint is this tree in a file."""

    key: fn.Key
    params: Tree
    state: fn.SGDState
    epoch: int
    """Whole epochs that are done."""
    step: int
    """Steps done of the epoch that has begun."""
    loss: float
    """The sum of these steps' losses."""
    best: Tree
    """The parameters of the best epoch."""
    history: list[dict[str, float]]


def start(optimizer: fn.SGD, shape: Sequence[int], key: fn.Key, device: torch.device) -> Progress:
    """New parameters for pictures of `shape`."""
    init_key, shuffle_key = fn.split(key)
    params = DENOISER.init(init_key, shape, device=device)
    return Progress(shuffle_key, params, optimizer.init(params), 0, 0, 0.0, copy(params), [])


def train_epoch(optimizer: fn.SGD, data: Data, p: Progress, batch_size: int) -> Iterator[Progress]:
    """Steps to the end of the epoch, from where `p` stands; the progress after each."""
    loss_and_grads = fn.value_and_grad(DENOISER, fn.MSE())
    device = device_of(p.params)
    order = shuffled(len(data.noisy), fn.fold_in(p.key, p.epoch))
    for rows in order.split(batch_size)[p.step :]:
        x, target = as_floats(data.noisy[rows], device), as_floats(data.target[rows], device)
        loss, grads = loss_and_grads(p.params, x, target)
        params, state = optimizer.step_(p.params, grads, p.state)
        p = p._replace(params=params, state=state, step=p.step + 1, loss=p.loss + float(loss))
        yield p


def end_epoch(p: Progress, row: dict[str, float]) -> Progress:
    """The progress at the start of the next epoch. The best parameters are those of best PSNR."""
    is_best = row["psnr"] > max((past["psnr"] for past in p.history), default=-math.inf)
    best = copy(p.params) if is_best else p.best
    return p._replace(epoch=p.epoch + 1, step=0, loss=0.0, best=best, history=[*p.history, row])


def schedule(peak: float, steps: int) -> Callable[[int], float]:
    """The learning rate: up to `peak` in the first tenth of all steps, then down a cosine."""

    def lr(step: int) -> float:
        warm_up = min(1.0, (step + 1) / (0.1 * steps))
        return peak * warm_up * (1 + math.cos(math.pi * step / steps)) / 2

    return lr


def shuffled(count: int, key: fn.Key) -> Tensor:
    """The numbers below `count` in random order."""
    return torch.argsort(fn.uniform(key, (count,), dtype=torch.float64), stable=True)


def as_floats(pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Floats in [0, 1] of bytes; floats as they are."""
    pictures = pictures.to(device)
    return pictures / 255 if pictures.dtype == torch.uint8 else pictures


def device_of(params: Tree) -> torch.device:
    leaf: Tensor = optree.tree_leaves(params)[0]
    return leaf.device


def copy(params: Tree) -> Tree:
    """`step_` writes into the parameters: what is to stay is copied."""
    return optree.tree_map(torch.clone, params)


# --- Checkpoints: files that hold the newest progress, and settings that a resumed run must share


@dataclass(frozen=True)
class Checkpoints:
    """The last `keep` of the checkpoints in a folder, one written `every` so many steps."""

    folder: Path
    every: int
    keep: int
    settings: dict[str, Any]

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, then remove the oldest."""
        steps = int(progress.state.step)
        path = self.folder / f"step-{steps:08}.safetensors"
        fn.save(path, progress, metadata={"settings": self.settings})
        for old in self.paths()[: -self.keep]:
            old.unlink()

    def load(self, device: torch.device) -> Progress | None:
        """The newest that is whole; None if there are no files."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                settings = fn.inspect(path).metadata.get("settings")
                progress: Progress = fn.load(path, device=device)
            except fn.CheckpointError as error:
                warn(f"{one_line(error)}; falling back to the checkpoint before")
                continue
            self.check(path, settings)
            return progress
        if paths:
            raise InputError(f"{self.folder}: expected a checkpoint that is whole, got none")
        return None

    def check(self, path: Path, settings: Any) -> None:
        """Refuse to go on from the checkpoint of another run."""
        if not isinstance(settings, dict):
            raise InputError(f"{path}: expected a checkpoint of this program")
        names = sorted(settings.keys() | self.settings.keys())
        wrong = [
            f"{name}: {settings.get(name)} then, {self.settings.get(name)} now"
            for name in names
            if settings.get(name) != self.settings.get(name)
        ]
        if wrong:
            raise InputError(f"{path}: cannot resume a run that differs ({'; '.join(wrong)})")

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        for path in self.paths():
            path.unlink()


def settings_of(options: argparse.Namespace, data: Data, device: torch.device) -> dict[str, Any]:
    """All that the trained parameters depend on."""
    checksum = 0
    for tensor in (data.noisy, data.target, data.held_out_noisy, data.held_out_clean):
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    names = ("noise", "level", "patches", "epochs", "batch_size", "lr", "momentum", "seed")
    return {
        **{name: getattr(options, name) for name in names},
        "device": device.type,
        "checksum of the data": f"{checksum:08x}",
    }


# --- Evaluation


def psnr(pictures: Tensor, clean: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each picture in dB, 10 · log₁₀(1 / MSE)."""
    mse = (pictures - clean).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(1e-10))


def denoise_patches(net: fn.Layer, params: Tree, noisy: Tensor) -> Tensor:
    """Pictures of one size that the network keeps."""
    device = device_of(params)
    parts = [net.apply(params, as_floats(part, device)).cpu() for part in noisy.split(256)]
    return torch.cat(parts)


TILE, MARGIN = 256, 16  # MARGIN is more than the denoiser sees around a pixel


def denoise_picture(net: fn.Layer, params: Tree, noisy: Tensor) -> Tensor:
    """A picture (3, H, W) of any size, continued by reflection; by tiles, to bound the memory."""
    device = device_of(params)
    _, height, width = noisy.shape
    sides = [(0, 0)] + [(MARGIN, MARGIN + -size % STRIDE) for size in (height, width)]
    padded = torch.from_numpy(np.pad(noisy.numpy(), sides, mode="reflect"))
    clean = torch.empty_like(noisy)
    reach = TILE + 2 * MARGIN
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            x = padded[None, :, top : top + reach, left : left + reach].to(device)
            y = net.apply(params, x)[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
            place = clean[:, top : top + TILE, left : left + TILE]
            place.copy_(y[:, : place.shape[1], : place.shape[2]])
    return clean


def non_local_means(noisy: Tensor) -> Tensor:
    """A classical denoiser to compare with, scikit-image's, told the strength of the noise.

    Of its settings for h, 0.6σ served our photographs better than 0.8σ and 1.0σ.
    """
    sigma = max(estimate_sigma(noisy), 1 / 255)
    denoised = [
        denoise_nl_means(
            picture.permute(1, 2, 0).numpy(),
            patch_size=5,
            patch_distance=6,
            h=0.6 * sigma,
            sigma=sigma,
            channel_axis=-1,
        )
        for picture in noisy
    ]
    return torch.from_numpy(np.stack(denoised)).permute(0, 3, 1, 2)


def estimate_sigma(noisy: Tensor) -> float:
    """σ of Gaussian noise from the median of the finest diagonal Haar coefficients.

    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika, 1994.
    """
    height, width = (size - size % 2 for size in noisy.shape[2:])
    x = noisy[:, :, :height, :width]
    detail = x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    return float((detail / 2).abs().median()) / 0.6745


# --- Pictures and other files

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(noisy, denoised, clean), each (3, H, W)."""


def draw_pictures(photograph: Triple | None, patches: Sequence[Triple]) -> Figure:
    """A whole photograph above, if there is one, and up to six patches below."""
    heights = [3.2]  # inches
    photographs = [photograph] if photograph else []
    for noisy, _, _ in photographs:
        heights.insert(0, 0.35 + 4 * noisy.shape[1] / noisy.shape[2])
    figure = Figure(figsize=(12, sum(heights)), layout="constrained", dpi=100)
    *above, below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    for whole, triple in zip(above, photographs, strict=True):
        draw_triple(whole.subplots(1, 3), triple)
    for i, column in enumerate(below.subfigures(1, 3, wspace=0.03)):
        for row, triple in enumerate(patches[2 * i : 2 * i + 2]):
            draw_triple([column.add_subplot(2, 3, 3 * row + k) for k in (1, 2, 3)], triple)
    return figure


def draw_triple(axes: Sequence[Axes], triple: Triple) -> None:
    """noisy | denoised | clean, with the PSNR under each."""
    noisy, denoised, clean = triple
    labels = [
        f"noisy {float(psnr(noisy[None], clean[None])):.1f} dB",
        f"denoised {float(psnr(denoised[None], clean[None])):.1f} dB",
        "clean",
    ]
    for ax, label, picture in zip(axes, labels, triple, strict=True):
        ax.imshow(as_bytes(picture), interpolation="nearest")
        ax.set(xticks=[], yticks=[], xlabel=label)


def draw_curves(history: Sequence[dict[str, float]], baselines: dict[str, float]) -> Figure:
    """Loss and PSNR by epoch, with the PSNR of `baselines` as lines."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    epochs = [int(row["epoch"]) for row in history]
    left.plot(epochs, [row["loss"] for row in history], "o-")
    left.set(ylabel="training loss (MSE to noisy targets)")
    right.plot(epochs, [row["psnr"] for row in history], "o-", label="denoiser")
    for color, (name, value) in zip(("tab:gray", "tab:orange"), baselines.items(), strict=True):
        right.axhline(value, color=color, linestyle="--", label=name)
    right.set(ylabel="PSNR of held-out pictures [dB]")
    right.legend()
    for ax in (left, right):
        ax.set(xlabel="epoch", xticks=epochs[:: 1 + len(epochs) // 10])
        ax.grid(alpha=0.3)
    return figure


def as_bytes(picture: Tensor) -> np.ndarray:
    """(H, W, 3) bytes of (3, H, W) in [0, 1]."""
    return (picture * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def csv_of(history: Sequence[dict[str, float]]) -> bytes:
    """A table with a line an epoch."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, history[0].keys())
    writer.writeheader()
    writer.writerows(history)
    return buffer.getvalue().encode()


def write(path: Path, content: bytes) -> None:
    """Replace a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


# --- The command line: train


def train(options: argparse.Namespace) -> None:
    """Train, then report; see the head of this file."""
    began = time.perf_counter()
    device = choose_device(options.device)
    data_key, train_key = fn.split(fn.key(options.seed))
    data = read_data(options, data_key)
    steps = math.ceil(len(data.noisy) / options.batch_size) * options.epochs
    optimizer = fn.SGD(schedule(options.lr, steps), momentum=options.momentum)
    settings = settings_of(options, data, device)
    folder = options.out / "checkpoints"
    checkpoints = Checkpoints(folder, options.checkpoint_every, options.keep, settings)
    progress = checkpoints.load(device) if options.resume else None
    folder.mkdir(parents=True, exist_ok=True)
    if progress is None:
        if options.resume:
            warn(f"{folder}: no checkpoint to resume from; starting from the beginning")
        checkpoints.clear()
        progress = start(optimizer, data.noisy.shape[1:], train_key, device)
    progress = train_to_the_end(options, optimizer, data, progress, checkpoints)
    report(options.out, data, progress)
    print(f"{options.out}: written in {time.perf_counter() - began:.0f} s")


def train_to_the_end(
    options: argparse.Namespace,
    optimizer: fn.SGD,
    data: Data,
    progress: Progress,
    checkpoints: Checkpoints,
) -> Progress:
    """All epochs that are left, with a checkpoint now and then, and the best model after each."""
    for epoch in range(progress.epoch + 1, options.epochs + 1):
        began = time.perf_counter()
        with tqdm(
            desc=f"epoch {epoch}/{options.epochs}",
            total=math.ceil(len(data.noisy) / options.batch_size),
            initial=progress.step,
            unit="step",
            leave=False,
        ) as bar:
            for after in train_epoch(optimizer, data, progress, options.batch_size):
                progress = after
                bar.set_postfix(loss=f"{mean_loss(progress):.5f}", refresh=False)
                bar.update()
                if int(progress.state.step) % checkpoints.every == 0:
                    checkpoints.save(progress)
        row = {
            "epoch": epoch,
            "loss": mean_loss(progress),
            "psnr": evaluate(progress.params, data),
            "seconds": round(time.perf_counter() - began, 2),
        }
        progress = end_epoch(progress, row)
        save_best(options.out, progress, data.title)
        print("epoch {epoch}: loss {loss:.5f}, PSNR {psnr:.2f} dB, {seconds:.1f} s".format(**row))
    checkpoints.save(progress)
    return progress


def mean_loss(progress: Progress) -> float:
    """That of the epoch so far. Raises InputError where it is no number any more."""
    loss = progress.loss / progress.step
    if not math.isfinite(loss):
        raise InputError(f"epoch {progress.epoch + 1}: the loss is {loss}; try a smaller --lr")
    return loss


def evaluate(params: Tree, data: Data) -> float:
    """Mean PSNR of the held-out pictures, denoised."""
    denoised = denoise_patches(DENOISER, params, data.held_out_noisy)
    return float(psnr(denoised, as_floats(data.held_out_clean)).mean())


def save_best(folder: Path, progress: Progress, title: str) -> None:
    """denoiser.safetensors and history.csv as they stand."""
    row = max(progress.history, key=lambda row: row["psnr"])
    metadata = {"epoch": row["epoch"], "psnr": row["psnr"], "measured on": title}
    fn.save_model(folder / "denoiser.safetensors", DENOISER, progress.best, metadata=metadata)
    write(folder / "history.csv", csv_of(progress.history))


def report(folder: Path, data: Data, progress: Progress) -> None:
    """What the result is worth beside a classical denoiser; the pictures and curves."""
    save_best(folder, progress, data.title)
    noisy, clean = as_floats(data.held_out_noisy), as_floats(data.held_out_clean)
    denoised = denoise_patches(DENOISER, progress.best, noisy)
    baselines = compare(data.title, noisy, denoised, clean)
    photograph = None
    if data.photograph is not None:
        noisy_whole, clean_whole = data.photograph
        denoised_whole = denoise_picture(DENOISER, progress.best, noisy_whole)
        photograph = (noisy_whole, denoised_whole, clean_whole)
        compare("a whole held-out photograph", *(picture[None] for picture in photograph))
    shown = torch.linspace(0, len(noisy) - 1, min(6, len(noisy))).long().tolist()
    patches = [(noisy[i], denoised[i], clean[i]) for i in shown]
    write(folder / "pictures.png", png(draw_pictures(photograph, patches)))
    write(folder / "curves.png", png(draw_curves(progress.history, baselines)))


def compare(title: str, noisy: Tensor, denoised: Tensor, clean: Tensor) -> dict[str, float]:
    """Print the mean PSNR of noisy, classically denoised and denoised pictures; the first two."""
    before = float(psnr(noisy, clean).mean())
    classical = float(psnr(non_local_means(noisy), clean).mean())
    ours = float(psnr(denoised, clean).mean())
    print(f"PSNR of {title}:")
    print(f"  noisy            {before:5.2f} dB")
    print(f"  non-local means  {classical:5.2f} dB, {classical - before:+.2f} dB (scikit-image)")
    print(f"  denoiser         {ours:5.2f} dB, {ours - before:+.2f} dB")
    return {"noisy": before, "non-local means": classical}


def read_data(options: argparse.Namespace, key: fn.Key) -> Data:
    """The data that the options name."""
    if (options.data is None) != (options.val is None):
        raise InputError("--data and --val: expected both or neither")
    if options.data is not None:
        if options.images or options.noise or options.level or options.patches:
            raise InputError("--data: --images, --noise, --level and --patches do not go with it")
        return file_data(options.data, options.val)
    kind = options.noise or "gaussian"
    noise = Noise(kind, options.level or DEFAULT_LEVELS[kind])
    return photograph_data(options.images, noise, options.patches or 10_000, key)


def choose_device(name: str) -> torch.device:
    """The device, set to give the same bits every time."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda")


# --- The command line: apply


def apply(options: argparse.Namespace) -> None:
    """Denoise one picture with a saved model. A transparent one keeps its transparency."""
    net, params = read_model(options.model, choose_device(options.device))
    image = open_picture(options.input)
    suffix = options.output.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{options.output}: expected a name that ends in one of {sorted(SUFFIXES)}"
        )
    if not options.output.parent.is_dir():
        raise InputError(f"{options.output.parent}: no such folder")
    is_gray = image.mode in ("1", "L", "LA", "La")
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    denoised = denoise_picture(net, params, as_tensor(image.convert("RGB")))
    result = Image.fromarray(as_bytes(denoised))
    if is_gray:
        result = result.convert("L")
    if has_alpha:
        result.putalpha(image.convert("RGBA").getchannel("A"))
    buffer = io.BytesIO()
    try:
        result.save(buffer, format=Image.registered_extensions()[suffix])
    except OSError as error:
        raise InputError(f"{options.output}: {error}") from None
    write(options.output, buffer.getvalue())


def read_model(path: Path, device: torch.device) -> tuple[fn.Layer, Tree]:
    """A network that makes an RGB picture of an RGB picture of the same size."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    net, params = fn.load_model(path, device=device)
    try:
        shape = net.apply(params, torch.zeros(1, 3, 2 * PATCH, 2 * PATCH, device=device)).shape
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a denoiser of RGB pictures ({error})") from None
    if shape != (1, 3, 2 * PATCH, 2 * PATCH):
        raise InputError(f"{path}: expected a network that keeps (3, H, W), got {net}")
    return net, params


# --- The command line


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"denoise.py: {message}\n")


def number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A number in a range, as an argument."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {noun} from {least:g} to {most:g}, got {text!r}"
            )
        return value

    return convert


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="denoise.py"
    )
    parser.set_defaults(command=train)
    count = number(int, 1, 10**9)
    positive = number(float, 1e-9, 1e9)
    add = parser.add_argument
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="train on the pictures in a folder, but every tenth, which is held out",
    )
    add("--data", type=Path, metavar="FILE", help="train on a pair of tensors (noisy, noisy)")
    add("--val", type=Path, metavar="FILE", help="with --data: the held-out pair (noisy, clean)")
    add("--patches", type=count, help="patches to train on (10000)")
    add("--noise", choices=DEFAULT_LEVELS, help="the kind of noise to add (gaussian)")
    add("--level", type=positive, help="255·σ (25) if gaussian, photons at white (30) if poisson")
    add("--epochs", type=count, default=6, help="(%(default)s)")
    add("--batch-size", type=count, default=16, help="(%(default)s)")
    add("--lr", type=positive, default=1.0, help="the learning rate's peak (%(default)s)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="(%(default)s)")
    add("--seed", type=number(int, 0, 2**64 - 1), default=0, help="(%(default)s)")
    add("--out", type=Path, default=Path("runs/denoise"), metavar="DIR", help="(%(default)s)")
    add("--checkpoint-every", type=count, default=250, metavar="STEPS", help="(%(default)s)")
    add("--keep", type=count, default=3, help="how many checkpoints stay (%(default)s)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add_device(parser)

    commands = parser.add_subparsers(title="other commands", metavar="apply")
    applying = commands.add_parser("apply", help="denoise a picture with a trained model")
    applying.set_defaults(command=apply)
    applying.add_argument("model", type=Path, metavar="MODEL")
    applying.add_argument("input", type=Path, metavar="IN.png")
    applying.add_argument("output", type=Path, metavar="OUT.png")
    add_device(applying)
    return parser.parse_args(arguments)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def warn(message: str) -> None:
    print(f"denoise.py: warning: {message}", file=sys.stderr)


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; end with one line on stderr and status 1 where its input cannot be used."""
    options = parse(arguments)
    try:
        options.command(options)
    except (InputError, fn.CheckpointError, OSError) as error:
        sys.exit(f"denoise.py: {one_line(error)}")


if __name__ == "__main__":
    main()
