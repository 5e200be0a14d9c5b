"""The results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from results import Results, Row
from targets import targets
from timing import Times

_TITLES = {"train": "Training steps", "infer": "Inference"}

_METHOD = """\
Times are medians in milliseconds, ± half the distance between the quartiles. Each contender has a
process of its own, and in every round runs for a slice of time in turn. The ratio is the fastest
other contender's time over funcnet's. Before a network is timed, outputs, losses and updated
parameters of all contenders are compared with those of torch.nn in float64. Beside the ratio are
the least, the median and the greatest of the rounds' ratios. Whole networks are timed
forward, loss, backward and update; layers on their own forward and backward, the gradient of x
included."""


def markdown(results: Results) -> str:
    """The whole report."""
    sections = [
        "# Benchmark",
        ", ".join(f"{key}: {value}" for key, value in results.machine.items()),
        _METHOD,
        *(section for mode in _TITLES for section in _times(results, mode)),
        *_compiling(results),
        *_growth(results),
        *_residuals(results),
        *_memory(results),
        *_arithmetic(results),
        *_targets(results),
    ]
    return "\n\n".join(sections) + "\n"


def _times(results: Results, mode: str) -> list[str]:
    if not results.rows:
        return []
    mean = f"Geometric mean of the ratios: **{results.mean_ratio(mode):.2f}×**"
    sections = [f"## {_TITLES[mode]}", _rows(results.networks(mode)), mean]
    layers = [row for row in results.mode(mode) if row not in results.networks(mode)]
    if layers:
        sections += [f"## {_TITLES[mode]}: layers on their own", _rows(layers)]
    return sections


def _rows(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    heads = ["network", "batch", *names, "ratio", "of the rounds"]
    return _table(heads, [_line(row, names) for row in rows])


def _line(row: Row, names: Sequence[str]) -> list[str]:
    times = [_time(row.times[name]) if name in row.times else "" for name in names]
    least, middle, most = row.spread
    spread = f"{least:.2f} … {middle:.2f} … {most:.2f}"
    return [row.network, str(row.batch), *times, f"**{row.ratio:.2f}×**", spread]


def _time(time: Times) -> str:
    spread = (time.high - time.low) / 2 / time.median
    return f"{_digits(time.median * 1e3)} ± {spread:.0%}"


def _digits(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 123, 1234."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _compiling(results: Results) -> list[str]:
    rows = [row for row in results.networks("train") if "torch.compile" in row.first_seconds]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row.first_seconds))
    lines = [
        [row.network, str(row.batch)]
        + [f"{row.first_seconds[n]:.1f}" if n in row.first_seconds else "" for n in names]
        for row in rows
    ]
    explanation = (
        "Seconds until a contender had inferred once and trained three steps, in a process that "
        "has compiled other networks before."
    )
    return [
        "## What compiling costs once",
        explanation,
        _table(["network", "batch", *names], lines),
    ]


def _growth(results: Results) -> list[str]:
    if not results.growth:
        return []
    names = list(results.growth[0].nanoseconds)
    heads = ["", "pixels", *(f"{name}: {unit}" for name in names for unit in ("ns a pixel", "MB"))]
    lines = [
        [g.mode, f"{g.side}²"]
        + [cell for n in names for cell in (_digits(g.nanoseconds[n]), _mb(g.peak[n]))]
        for g in results.growth
    ]
    explanation = (
        "The least of three forward passes or training steps, and the memory of the process at its "
        "peak in the first one, beyond what it was before."
    )
    return ["## The denoiser on one large image", explanation, _table(heads, lines)]


def _residuals(results: Results) -> list[str]:
    if not results.residuals:
        return []
    whole = results.residuals[0]
    lines = [
        [
            k.name,
            f"{k.bytes / 1e6:.1f}",
            _digits(k.seconds * 1e3),
            f"{k.seconds / whole.seconds:.2f}×",
        ]
        for k in results.residuals
    ]
    heads = ["network", "MB kept between fwd and bwd", "ms of both", "of the first's time"]
    return ["## Residuals", _table(heads, lines)]


def _memory(results: Results) -> list[str]:
    if not results.memory:
        return []
    lines = [
        [name, _mb(m.live), _mb(m.baseline), _mb(m.peak), _mb(m.peak - m.baseline)]
        for name, m in results.memory.items()
    ]
    heads = ["contender", "live tensors", "process after imports", "process at peak", "difference"]
    explanation = (
        "At most, in MB, each contender in a process of its own. Parameters, optimizer state and "
        "the batch are counted. All have the same imports; torch.compile loads its compiler later."
    )
    title = "## Memory of the denoiser's training step, batch 64"
    return [title, explanation, _table(heads, lines)]


def _mb(count: float | None) -> str:
    return "–" if count is None or math.isnan(count) else f"{count / 1e6:.0f}"


def _arithmetic(results: Results) -> list[str]:
    rates = results.rates
    return [
        "## Arithmetic",
        f"Matrix products on this machine: {rates.mm / 1e9:.0f} Gflop/s by torch.mm, "
        f"{rates.conv1x1 / 1e9:.0f} by a 1×1 convolution in channels_last. The denoiser's training "
        f"step at batch 64 needs {results.operations / 1e9:.2f} Gflop: "
        f"{results.operations / rates.best * 1e3:.3g} ms at the better rate.",
    ]


def _targets(results: Results) -> list[str]:
    lines = [
        [t.name, t.wish, f"{t.value:.3g}{t.unit}", "reached" if t.reached else "**not reached**"]
        for t in targets(results)
    ]
    return ["## Targets", _table(["what", "wanted", "measured", ""], lines)] if lines else []


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
