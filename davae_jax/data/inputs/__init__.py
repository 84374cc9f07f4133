"""The forms in which texts come: files and folders of text, JSON, Parquet and Arrow."""
