"""Algorithms on tensors, and the choice between them. Nothing here knows a layer or refuses."""
