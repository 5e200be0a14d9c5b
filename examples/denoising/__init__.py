"""The parts of examples/denoise.py that are not the network or the training loop."""
