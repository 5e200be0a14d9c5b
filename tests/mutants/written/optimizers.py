"""Bugs in the optimizers."""

from __future__ import annotations

from ..mutant import in_file

OPTIMIZERS = in_file(
    "optimizers/sgd.py",
    "test_optimizers.py test_gate_properties.py test_transforms.py",
)
