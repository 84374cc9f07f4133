"""Generation from a model: sampling, cached decoding, and `TextVAE` from texts to texts."""
