"""Folders of shards: what `davae prepare` writes, and the batches of it."""
