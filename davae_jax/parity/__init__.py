"""Compares the JAX model with a PyTorch twin of the published one, module by module."""
