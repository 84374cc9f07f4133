"""The PyTorch twin, and the comparison with it module by module."""
