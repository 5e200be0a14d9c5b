"""Optimisers: steps on parameter trees, which may be any trees that `optree` accepts."""

from funcnet.optimizers.adam import Adam, AdamState, AdamW
from funcnet.optimizers.averaging import average
from funcnet.optimizers.norms import clip_by_global_norm, global_norm
from funcnet.optimizers.optimizer import Optimizer
from funcnet.optimizers.partition import Partition, PartitionState
from funcnet.optimizers.rmsprop import RMSprop, RMSpropState
from funcnet.optimizers.sgd import SGD, SGDState

__all__ = [
    "SGD",
    "Adam",
    "AdamState",
    "AdamW",
    "Optimizer",
    "Partition",
    "PartitionState",
    "RMSprop",
    "RMSpropState",
    "SGDState",
    "average",
    "clip_by_global_norm",
    "global_norm",
]
