"""The results as a figure: how many times longer the others take."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from entries import CHANNELS_LAST, COMPILED, GRAPH, OURS, PURE
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from results import Results, Row

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_TITLES = {"train": "Training step", "infer": "Inference"}

_STYLES = {
    PURE: ("#999999", "x"),
    GRAPH: ("#000000", "*"),
    COMPILED: ("#756bb1", "v"),
    "torch.nn": ("#9ecae1", "o"),
    CHANNELS_LAST: ("#2171b5", "s"),
    "torch.compile": ("#e6550d", "^"),
    "JAX stax, jit": ("#31a354", "D"),
}


def save_plot(results: Results, path: Path) -> None:
    """One line a network and batch size, one mark a contender; training beside inference."""
    rows = results.mode("train")
    figure, axes = plt.subplots(
        1, 2, sharex=True, sharey=True, figsize=(12, 2.2 + 0.34 * len(rows)), layout="constrained"
    )
    for ax, (mode, title) in zip(axes, _TITLES.items(), strict=True):
        _draw(ax, results.mode(mode))
        ax.set_xlim(*_limits(results.rows))
        ax.set_title(f"{title}, geometric mean {results.mean_ratio(mode):.2f}×")
    axes[0].set_yticks(range(len(rows)), [f"{row.network}, batch {row.batch}" for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    place = ", ".join(f"{key} {results.machine[key]}" for key in ("threads", "dtype", "torch"))
    figure.suptitle(f"{results.machine['processor']}: {place}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _limits(rows: list[Row]) -> tuple[float, float]:
    """The limits of an axis with room for every median."""
    units = [time.median / row.times[OURS].median for row in rows for time in row.times.values()]
    return min(units) / 1.3, max(units) * 1.3


def _draw(ax: Axes, rows: list[Row]) -> None:
    ax.axvline(1, color="black", linewidth=1)
    for name, (color, marker) in _STYLES.items():
        _draw_contender(ax, rows, name, color, marker)
    for i, row in enumerate(rows):
        ax.annotate(
            f"{row.ratio:.2f}×",
            (1.01, i),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="center",
            color="black" if row.ratio >= 1 else "#d62728",
        )
    _dress(ax)


def _draw_contender(ax: Axes, rows: list[Row], name: str, color: str, marker: str) -> None:
    """Medians and quartiles, in units of our medians."""
    points = [
        (i, row.times[name], row.times[OURS].median)
        for i, row in enumerate(rows)
        if name in row.times
    ]
    if not points:
        return
    ax.errorbar(
        [time.median / unit for _, time, unit in points],
        [i for i, _, _ in points],
        xerr=[
            [(time.median - time.low) / unit for _, time, unit in points],
            [(time.high - time.median) / unit for _, time, unit in points],
        ],
        fmt=marker,
        color=color,
        label=name,
        markersize=5,
        elinewidth=1,
    )


def _dress(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(color="#e8e8e8")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("time in units of funcnet's; at the right, the fastest other's")
