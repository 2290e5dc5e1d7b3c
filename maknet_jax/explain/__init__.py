"""Selecting images to explain, and explaining them in batches that resume."""
