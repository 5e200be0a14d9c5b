"""The results of a run of the benchmark."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from arithmetic import Rates, operations
from entries import OURS
from growth import Growth
from memory import Memory
from networks import MEASURED, all_networks
from residuals import Kept
from timing import Times
from worker import Settings


@dataclass(frozen=True)
class Row:
    """The times of all contenders for one network, one batch size, and training or inference."""

    network: str
    batch: int
    mode: str
    """"train" or "infer"."""
    times: dict[str, Times]
    is_layer: bool = False
    first_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds until a contender had inferred once and trained three steps; compiling is in them."""

    @property
    def fastest(self) -> str:
        """The fastest contender that is not ours."""
        others = (name for name in self.times if not name.startswith(OURS))
        return min(others, key=lambda name: self.times[name].median)

    @property
    def ratio(self) -> float:
        """The fastest other's time over ours: how many times faster we are."""
        return self.times[self.fastest].median / self.times[OURS].median

    @property
    def spread(self) -> tuple[float, float, float]:
        """The least, the median and the greatest ratio of a round to that contender."""
        theirs, ours = (self.times[name].samples for name in (self.fastest, OURS))
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        return min(ratios), median(ratios), max(ratios)

    def __str__(self) -> str:
        ours = self.times[OURS].median * 1e3
        least, _, most = self.spread
        return (
            f"{self.network:<27}{self.batch:>5}  {self.mode:<6}{self.ratio:6.2f}× "
            f"({least:.2f} to {most:.2f})  "
            f"{ours:.3g} ms against {ours * self.ratio:.3g} ({self.fastest})"
        )


@dataclass(frozen=True)
class Results:
    """Everything that is reported."""

    machine: dict[str, str]
    rows: list[Row]
    memory: dict[str, Memory]
    """The memory of a training step of `MEASURED`, by contender; empty if not measured."""
    rates: Rates
    growth: list[Growth] = field(default_factory=list)
    residuals: list[Kept] = field(default_factory=list)

    @property
    def is_mixed(self) -> bool:
        """Whether products were made in bfloat16."""
        return "mixed" in self.machine["dtype"]

    @property
    def operations(self) -> int:
        """The operations of a training step of `MEASURED`."""
        (network,) = (n for n in all_networks() if n.name == MEASURED[0])
        return operations(network.net, network.shape, MEASURED[1])

    def mode(self, mode: str) -> list[Row]:
        """The rows of training, or of inference."""
        return [row for row in self.rows if row.mode == mode]

    def networks(self, mode: str) -> list[Row]:
        """The rows of whole networks, or of layers if there are no others."""
        rows = self.mode(mode)
        return [row for row in rows if not row.is_layer] or rows

    def row(self, network: str, batch: int, mode: str) -> Row | None:
        """One of the rows, or None if it was not run."""
        wanted = (network, batch, mode)
        return next((r for r in self.rows if (r.network, r.batch, r.mode) == wanted), None)

    def mean_ratio(self, mode: str) -> float:
        """The geometric mean of the ratios of whole networks."""
        return geometric_mean(row.ratio for row in self.networks(mode))

    def as_json(self) -> dict[str, Any]:
        """The results as dicts, lists and numbers, times in seconds and memory in bytes."""
        rows = [
            {**asdict(row), "fastest_other": row.fastest, "ratio": row.ratio, "spread": row.spread}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows, "operations": self.operations}


def machine(settings: Settings, dtype: torch.dtype, mixed: bool) -> dict[str, str]:
    """The machine and the versions."""
    device = settings.device
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "jax")
        if importlib.util.find_spec(package)
    }
    return {
        "processor": _processor(),
        "processors": str(os.cpu_count()),
        "threads": str(settings.threads),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch.") + (", mixed with bfloat16" if mixed else ""),
        "others keep freed memory": "yes" if settings.keep_memory else "no",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
