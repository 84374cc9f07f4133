"""What lies on disk: weights, the published layout, conversion both ways."""
