"""The step, the optimiser and what a run keeps."""
