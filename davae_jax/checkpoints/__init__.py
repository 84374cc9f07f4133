"""Reads and writes checkpoints: Orbax weights, the published PyTorch layout, and the conversion between them."""
