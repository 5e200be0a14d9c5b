"""The project's targets, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from entries import OURS, PURE
from results import Results

_BATCH = 64
_EPOCH = 50_000


@dataclass(frozen=True)
class Target:
    """A number that should be at least, or at most, another."""

    name: str
    value: float
    wanted: float
    at_most: bool = False
    unit: str = "×"

    @property
    def reached(self) -> bool:
        """Whether the value meets the target."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    @property
    def wish(self) -> str:
        """The target as text: "≥ 3×"."""
        return f"{'≤' if self.at_most else '≥'} {self.wanted:g}{self.unit}"


def targets(results: Results) -> list[Target]:
    """The targets that this run has numbers for."""
    if not results.rows:
        return []
    return [*_speed(results), *_denoiser(results), *_memory(results), *_gpu(results)]


def _speed(results: Results) -> list[Target]:
    slowest = min(results.mode("train"), key=lambda row: row.ratio)
    where = f"{slowest.network}, batch {slowest.batch}"
    return [
        Target(f"least of all training steps ({where}), against the fastest", slowest.ratio, 1),
        Target("all training steps, geometric mean", results.mean_ratio("train"), 1.5),
    ]


def _denoiser(results: Results) -> list[Target]:
    train = results.row("denoiser", _BATCH, "train")
    infer = results.row("denoiser", _BATCH, "infer")
    if train is None or infer is None:
        return []
    ours = train.times[OURS].median
    rate = results.operations / ours / results.rates.best
    pure = train.times[PURE].median / ours
    least = 2 if results.is_mixed else 3
    return [
        Target("denoiser, batch 64: training step, against the fastest", train.ratio, least),
        Target("denoiser, batch 64: inference, against the fastest", infer.ratio, 2),
        Target("denoiser, batch 64: pure `step`, in times of `step_`", pure, 1.03, at_most=True),
        Target("denoiser, batch 64: share of the matrix-product rate", 100 * rate, 70, unit=" %"),
    ]


def _memory(results: Results) -> list[Target]:
    if not results.memory:
        return []
    ours, theirs = (results.memory[name].live or 0 for name in (OURS, "torch.nn"))
    name = "denoiser, batch 64: live bytes, in times of torch.nn"
    return [Target(name, ours / theirs, 0.5, at_most=True)]


def _gpu(results: Results) -> list[Target]:
    rows = [row for row in results.mode("train") if row.network == "denoiser"]
    if results.machine["device"] == "cpu" or not rows:
        return []
    epoch = min(
        time.median * _EPOCH / row.batch
        for row in rows
        for name, time in row.times.items()
        if name.startswith(OURS)
    )
    name = f"denoiser: an epoch of {_EPOCH} images at the best batch size"
    return [Target(name, epoch, 0.5, at_most=True, unit=" s")]
