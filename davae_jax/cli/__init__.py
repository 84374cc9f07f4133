"""The command line: one file a command family, over `base.py`."""
