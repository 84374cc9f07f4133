"""Programs that convert checkpoints between the published PyTorch layout and this package, and compare both."""
