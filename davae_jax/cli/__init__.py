"""The command line: one file per command family, on top of `base.py`."""
