"""Augmentation, losses, optimisers, the training step, checkpoints and logs."""
