"""The results as a picture: how many times longer the others take."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from entries import GRAPH, OURS, PURE
from matplotlib.axes import Axes
from results import Results, Row

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_STYLES = {
    OURS: ("#111111", "|"),
    PURE: ("#777777", "x"),
    GRAPH: ("#000000", "*"),
    "torch.nn": ("#9ecae1", "o"),
    "torch.nn channels_last": ("#2171b5", "s"),
    "torch.compile": ("#e6550d", "^"),
    "JAX stax, jit": ("#31a354", "D"),
}


def save_plot(results: Results, path: Path) -> None:
    """One line a network and batch size, one mark a contender, training beside inference."""
    rows = results.mode("train")
    figure, axes = plt.subplots(
        1, 2, sharey=True, figsize=(12, 1.8 + 0.34 * len(rows)), layout="constrained"
    )
    for ax, mode, title in zip(
        axes, ("train", "infer"), ("Training step", "Inference"), strict=True
    ):
        _draw(ax, results.mode(mode))
        ax.set_title(f"{title}: geometric mean {results.mean_ratio(mode):.2f}× against the fastest")
    axes[0].set_yticks(range(len(rows)), [f"{row.network}, batch {row.batch}" for row in rows])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    machine = results.machine
    figure.suptitle(
        f"Time in units of funcnet's — {machine['processor']}, {machine['threads']} threads, "
        f"{machine['dtype']}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(ax: Axes, rows: list[Row]) -> None:
    for name, (color, marker) in _STYLES.items():
        points = [(i, row) for i, row in enumerate(rows) if name in row.times]
        if not points or name == OURS:
            continue
        units = [row.times[OURS].median for _, row in points]
        times = [row.times[name] for _, row in points]
        middles = [t.median / unit for t, unit in zip(times, units, strict=True)]
        below = [(t.median - t.low) / unit for t, unit in zip(times, units, strict=True)]
        above = [(t.high - t.median) / unit for t, unit in zip(times, units, strict=True)]
        ax.errorbar(
            middles,
            [i for i, _ in points],
            xerr=[below, above],
            fmt=marker,
            color=color,
            label=name,
            markersize=5,
            elinewidth=1,
        )
    ax.axvline(1, color="#111111", linewidth=1)
    ax.set_xscale("log")
    ax.grid(axis="y", color="#eeeeee")
    ax.grid(axis="x", which="both", color="#eeeeee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("times funcnet's time (right of the line: slower than funcnet)")
