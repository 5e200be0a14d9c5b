"""Bugs in the optimizers."""

from __future__ import annotations

from ..mutant import Row, in_file

OPTIMIZERS = in_file(
    "optimizers/sgd.py",
    "test_optimizers.py test_gate_properties.py test_transforms.py",
    Row("maximize-ignored", "g = each.neg(g)", "g = list(g)", "maximize climbs"),
    Row(
        "weight-decay-sign",
        "g = each.add(g, p, self.weight_decay)",
        "g = each.add(g, p, -self.weight_decay)",
        "weight decay pulls towards 0",
    ),
    Row(
        "dampening-at-the-first-step",
        "return 1.0 if n == 1 else 1.0 - self.dampening",
        "return 1.0 - self.dampening",
        "the first velocity is the gradient",
    ),
    Row(
        "nesterov-ignored",
        "g = each.add(g, v, self.momentum) if self.nesterov else v",
        "g = v",
        "Nesterov's step looks ahead",
    ),
    Row(
        "nesterov-without-gradient",
        "g = each.add(g, v, self.momentum) if self.nesterov else v",
        "g = each.add(v, v, self.momentum) if self.nesterov else v",
        "Nesterov's step adds the velocity to the gradient",
    ),
)
