"""Reads texts, tokenizes them, stores them in shards, and lays them out in batches."""
