"""Provides errors, files, settings, sizes and worker processes, independent of the model."""
