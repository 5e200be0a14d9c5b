"""The files that a run leaves in its folder, and the tables that it prints at its end."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import funcnet as fn
from denoising.data import Data
from denoising.evaluation import compare, score
from denoising.figures import write_curves, write_pictures
from denoising.pictures import writing
from denoising.progress import Progress
from denoising.tiles import Denoiser


def save_best(folder: Path, net: fn.Layer, progress: Progress, data: Data) -> None:
    """Write denoiser.safetensors, of the best epoch, and history.csv as they stand."""
    row = max(progress.history, key=score)
    metadata = {"measured on": data.title, **{k: v for k, v in row.items() if k != "seconds"}}
    fn.save_model(folder / "denoiser.safetensors", net, progress.best, metadata=metadata)
    table = io.StringIO()
    writer = csv.DictWriter(table, row.keys())
    writer.writeheader()
    writer.writerows(progress.history)
    with writing(folder / "history.csv") as file:
        file.write(table.getvalue().encode())


def write_report(folder: Path, net: fn.Layer, progress: Progress, data: Data) -> None:
    """Print the tables, and write pictures.png and curves.png, of the best parameters."""
    save_best(folder, net, progress, data)
    results = compare(Denoiser.of(net, progress.best), data)
    for result in results:
        print(result.table())
    write_pictures(folder / "pictures.png", results)
    write_curves(folder / "curves.png", progress.history, results[0])


def epoch_line(row: dict[str, float]) -> str:
    if "psnr" in row:
        quality = f"PSNR {row['psnr']:.2f} dB"
    else:
        quality = f"held-out loss {row['held_out_loss']:.5f}"
    return f"epoch {row['epoch']}: loss {row['loss']:.5f}, {quality}, {row['seconds']:.1f} s"
