"""Bugs in the optimizers."""

from __future__ import annotations

from ..mutant import Row, in_file

FORMULAS = in_file(
    "optimizers/sgd.py",
    "test_gate_properties.py test_optimizers.py",
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
        "momentum-after-the-gradient",
        "each.add_(each.mul_(v, self.momentum), g, self._share_of_gradient(n))",
        "each.mul_(each.add_(v, g, self._share_of_gradient(n)), self.momentum)",
        "v is multiplied before g is added",
    ),
    Row(
        "velocities-not-written",
        "each.add_(each.mul_(v, self.momentum), g, self._share_of_gradient(n))",
        "each.add_([x * self.momentum for x in v], g, self._share_of_gradient(n))",
        "step_ writes into the velocities of the state",
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

STEPS = in_file(
    "optimizers/optimizer.py",
    "test_gate_properties.py test_optimizers.py",
    Row("schedule-off-by-one", "self._lr(count)", "self._lr(count + 1)", "the first step is 0"),
    Row(
        "step-in-place-does-not-write",
        "update(Each(write), lr,",
        "update(Each(False), lr,",
        "step_ writes into params",
    ),
    Row("pure-step-writes", "update(Each(write), lr,", "update(Each(True), lr,", "step is pure"),
    Row(
        "imaginary-parts-lost",
        "update = self._update_pairs if self._treats_complex_as_pairs else self._update",
        "update = self._update",
        "Adam treats real and imaginary parts apart",
    ),
)

LEAVES = in_file(
    "optimizers/leaves.py",
    "test_gate_properties.py test_optimizers.py",
    Row(
        "structure-unchecked",
        "return structure.flatten_up_to(tree)",
        "return optree.tree_leaves(tree)",
        "grads of another structure are refused, not matched by position",
    ),
)

EACH = in_file(
    "ops/each.py",
    "test_gate_properties.py test_optimizers.py",
    Row(
        "lists-under-vmap",
        "self.eager = is_eager()",
        "self.eager = True",
        "vmap has no rule for lists of tensors",
    ),
    Row(
        "mapped-step-in-place-does-not-write",
        "return [x.copy_(result) for x, result in zip(xs, results, strict=True)]",
        "return results",
        "step_ writes into params under vmap, too",
    ),
    Row(
        "any-list-is-new",
        "type(xs) is _New and",
        "self.eager and",
        "step is pure",
    ),
)

OPTIMIZERS = (*FORMULAS, *STEPS, *LEAVES, *EACH)
