"""Errors, files, settings, sizes and worker processes: what does not depend on the model."""
