"""Layers made of layers."""

from funcnet.combinators.sequential import Sequential

__all__ = ["Sequential"]
