"""Measures what the program costs: one command for each question (`python -m benchmarks` lists them).

A benchmark is a module of this folder that has a function `main(argv)`. The first line of its docstring is the question
that it answers. `common.py` has what they share.
"""
