"""Runs: configs, the assembly of model, optimiser and steps, and workdirs."""
