"""Texts: read, tokenised, laid out in batches."""
