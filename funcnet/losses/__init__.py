"""Losses: how far x is from a target, as one number, and the gradient of that."""

from funcnet.losses.bce_with_logits import BCEWithLogits
from funcnet.losses.cross_entropy import CrossEntropy
from funcnet.losses.huber import Huber
from funcnet.losses.l1 import L1
from funcnet.losses.loss import Loss
from funcnet.losses.mse import MSE

__all__ = ["L1", "MSE", "BCEWithLogits", "CrossEntropy", "Huber", "Loss"]
