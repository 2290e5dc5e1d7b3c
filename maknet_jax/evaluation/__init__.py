"""Metrics and the evaluation protocol of the paper's tables."""
