"""Evaluates models: metrics, confidence intervals, comparisons."""
