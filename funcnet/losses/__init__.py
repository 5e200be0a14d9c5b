"""Losses: how far x is from a target, as one number, and the gradient of that."""

from funcnet.losses.loss import Loss
from funcnet.losses.mse import MSE

__all__ = ["MSE", "Loss"]
