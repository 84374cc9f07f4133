"""The model and its losses."""
