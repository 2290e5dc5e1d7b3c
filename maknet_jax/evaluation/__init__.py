"""Metrics and the protocol behind the tables of the paper."""
