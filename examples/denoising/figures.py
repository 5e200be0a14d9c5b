"""The images and curves that a run leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from denoising.evaluation import Result, psnr
from denoising.pictures import writing

WIDTH = 13.0  # inches
DETAIL = 160  # pixels of a photograph that are shown enlarged


def write_pictures(path: Path, results: Sequence[Result]) -> None:
    """For each result, noisy, non-local means, denoised and clean beside each other.

    Of a photograph, the whole and a part that is enlarged; of the patches, four.
    """
    patches, *photographs = results
    rows: list[Result] = []
    for photograph in photographs:
        rows += [photograph, detail_of(photograph)]
    shown = np.linspace(0, len(patches.noisy) - 1, 2 if photographs else 4).astype(int)
    rows += [one_of(patches, i) for i in dict.fromkeys(shown.tolist())]
    shapes = [row.noisy.shape[2:] for row in rows]
    heights = [0.3 + WIDTH / 4 * min(height / width, 3.0) for height, width in shapes]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained", dpi=100)
    grid = figure.subplots(len(rows), 4, height_ratios=heights, squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        draw_row(axes, row)
    save(figure, path)


def draw_row(axes: Sequence[Axes], result: Result) -> None:
    rows = {
        **{name.replace("denoiser", "denoised"): x for name, x in result.rows().items()},
        "clean" if result.is_clean else "the other noisy copy": result.target,
    }
    for ax, (name, picture) in zip(axes, rows.items(), strict=True):
        if result.is_clean and picture is not result.target:
            name = f"{name}  {float(psnr(picture, result.target)):.1f} dB"
        ax.imshow(as_bytes(picture[0]), interpolation="nearest")
        ax.set(xticks=[], yticks=[], xlabel=name)


def one_of(result: Result, i: int) -> Result:
    return crop(result, slice(i, i + 1), slice(None), slice(None))


def detail_of(photograph: Result) -> Result:
    """The square of the noisy image in which brightness differs most."""
    _, _, height, width = photograph.noisy.shape
    side = min(DETAIL, height, width)
    gray = photograph.classical[0].mean(0)
    corners = [
        (top, left)
        for top in range(0, height - side + 1, max(1, side // 2))
        for left in range(0, width - side + 1, max(1, side // 2))
    ]
    top, left = max(
        corners, key=lambda c: float(gray[c[0] : c[0] + side, c[1] : c[1] + side].var())
    )
    return crop(photograph, slice(None), slice(top, top + side), slice(left, left + side))


def crop(result: Result, examples: slice, rows: slice, columns: slice) -> Result:
    cut = (examples, slice(None), rows, columns)
    parts = [x[cut] for x in (result.noisy, result.classical, result.denoised, result.target)]
    return Result(result.title, *parts, result.is_clean)


def write_curves(path: Path, history: Sequence[dict[str, float]], result: Result) -> None:
    """Loss and quality by epoch, beside the noisy images and non-local means."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    epochs = [int(row["epoch"]) for row in history]
    left.plot(epochs, [row["loss"] for row in history], "o-")
    left.set(ylabel="training loss (MSE to noisy targets)")
    name = "psnr" if result.is_clean else "held_out_loss"
    right.plot(epochs, [row[name] for row in history], "o-", label="denoiser")
    baselines = {"noisy": "tab:gray", "non-local means": "tab:orange"}
    for baseline, color in baselines.items():
        level = result.quality(result.rows()[baseline])
        right.axhline(level, color=color, linestyle="--", label=baseline)
    right.set(
        ylabel="PSNR of held-out images [dB]"
        if result.is_clean
        else "MSE to the other copy of held-out images"
    )
    right.legend()
    for ax in (left, right):
        ax.set(xlabel="epoch", xticks=epochs[:: 1 + len(epochs) // 10])
        ax.grid(alpha=0.3)
    save(figure, path)


def as_bytes(picture: Tensor) -> np.ndarray:
    """(H, W, 3) bytes of (3, H, W) in [0, 1]."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def save(figure: Figure, path: Path) -> None:
    with writing(path) as file:
        figure.savefig(file, format="png")
