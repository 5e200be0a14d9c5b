"""What was measured, as text."""

from __future__ import annotations

from dataclasses import dataclass

from entries import OURS
from timing import Times


@dataclass(frozen=True)
class Row:
    """The times of all contenders for one network, one batch size, and training or inference."""

    network: str
    batch: int
    mode: str
    times: dict[str, Times]

    @property
    def fastest(self) -> str:
        """The fastest contender that is not ours."""
        others = (name for name in self.times if not name.startswith("funcnet"))
        return min(others, key=lambda name: self.times[name].median)

    @property
    def ratio(self) -> float:
        """The fastest other's time over ours."""
        return self.times[self.fastest].median / self.times[OURS].median

    def __str__(self) -> str:
        head = f"{self.network:<22} {self.batch:>4} {self.mode:<6} {self.ratio:5.2f}×  "
        return head + "  ".join(f"{n} {t.median * 1e3:.3f}" for n, t in self.times.items())
