"""Converting checkpoints between the published PyTorch files and this package, and checking one against the other."""
