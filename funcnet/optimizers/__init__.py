"""Optimisers: steps that map over parameter trees, any that `optree` accepts."""

from funcnet.optimizers.sgd import SGD, SGDState

__all__ = ["SGD", "SGDState"]
