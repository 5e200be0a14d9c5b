"""Bugs in the optimizers."""

from __future__ import annotations

from ..mutant import Row, in_file

OPTIMIZERS = in_file(
    "optimizers.py",
    "test_optimizers.py test_gate_properties.py test_transforms.py",
    Row(
        "lists-under-vmap",
        "if not (xs and inplace.is_plain()):",
        "if not xs:",
        "vmap has no rule for lists of tensors",
    ),
    Row(
        "maximize-ignored",
        "gs = [-g for g in gs]",
        "gs = [+g for g in gs]",
        "maximize goes uphill",
    ),
    Row(
        "weight-decay-sign",
        "_add(gs, ps, self.weight_decay, write=False)",
        "_add(gs, ps, -self.weight_decay, write=False)",
        "weight decay makes weights smaller",
    ),
    Row(
        "dampening-at-the-first-step",
        "return 1.0 if count == 0 else 1.0 - self.dampening",
        "return 1.0 - self.dampening",
        "v is g at the first step",
    ),
    Row(
        "dampening-at-the-first-step-of-many",
        "(count > 0)",
        "(count >= 0)",
        "v is g at the first step under vmap, too",
    ),
    Row(
        "nesterov-ignored",
        "gs = _add(gs, vs, self.momentum, write=False) if self.nesterov else vs",
        "gs = vs",
        "nesterov looks ahead",
    ),
    Row(
        "nesterov-without-gradient",
        "gs = _add(gs, vs, self.momentum, write=False) if self.nesterov else vs",
        "gs = [v * self.momentum for v in vs] if self.nesterov else vs",
        "nesterov's step is g + momentum · v",
    ),
    Row(
        "momentum-after-the-gradient",
        "_add(vs, gs, self._share_of_gradient(count), write)",
        "_add(vs, gs, self.momentum * self._share_of_gradient(count), write)",
        "v is multiplied before g is added",
    ),
    Row(
        "schedule-off-by-one",
        "self._lr(count), count, write",
        "self._lr(count + 1), count, write",
        "the first step is number 0",
    ),
    Row(
        "step-not-counted",
        "SGDState(state.step + 1, velocities)",
        "SGDState(state.step + 0, velocities)",
        "schedules and dampening depend on the count",
    ),
    Row(
        "step-in-place-does-not-write",
        "    if not write:\n",
        "    if True:\n",
        "step_ writes into params",
    ),
    Row(
        "pure-step-writes-params",
        "    if not write:\n",
        "    if False:\n",
        "step is pure",
    ),
    Row(
        "mapped-pure-step-writes-params",
        "x.add_(y, alpha=alpha) if write else x.add(y, alpha=alpha)",
        "x.add_(y, alpha=alpha)",
        "step is pure under vmap, too",
    ),
    Row(
        "mapped-step-in-place-does-not-write",
        "x.add_(y, alpha=alpha) if write else x.add(y, alpha=alpha)",
        "x.add(y, alpha=alpha)",
        "step_ writes into params under vmap, too",
    ),
    Row(
        "pure-step-writes-velocities",
        "v.mul_(self.momentum) if write else v * self.momentum for",
        "v.mul_(self.momentum) for",
        "step is pure",
    ),
    Row(
        "velocities-not-written",
        "v.mul_(self.momentum) if write else v * self.momentum for",
        "v * self.momentum for",
        "step_ writes into the velocities of the state",
    ),
    Row(
        "structure-unchecked",
        "structure.flatten_up_to(tree)",
        "optree.tree_leaves(tree)",
        "grads of another structure are refused, not matched by position",
    ),
    Row(
        "gradient-of-another-dtype",
        "if leaf.shape != p.shape or leaf.dtype != p.dtype or leaf.device != p.device:",
        "if leaf.shape != p.shape:",
        "params would silently change their dtype",
    ),
    Row(
        "nan-is-a-learning-rate",
        "if not (-math.inf < value < math.inf and value >= least):",
        "if value < least or value == math.inf:",
        "NaN is out of range",
    ),
)
