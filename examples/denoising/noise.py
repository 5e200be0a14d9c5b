"""Noise of mean zero, to be added to clean images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import funcnet as fn

DEFAULT_LEVELS = {"gaussian": 25.0, "poisson": 30.0}
MOST_LEVELS = {"gaussian": 1000.0, "poisson": 1e6}


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of σ = level/255, or Poisson noise with `level` photons at white."""

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
