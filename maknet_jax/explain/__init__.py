"""Selects images and explains them in batches; resumes if interrupted."""
