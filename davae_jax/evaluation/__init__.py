"""What a model is worth: measures, intervals, statistics."""
