"""Texts from a model: sampling, generation, `TextVAE`."""
