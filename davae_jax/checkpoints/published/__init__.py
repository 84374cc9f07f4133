"""The published layout of a model: its files, names and both directions of the conversion."""
