"""The files of a run: its folder and saved settings, tokenizers, log and checkpoints."""
