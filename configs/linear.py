"""A linear model on 32 x 32 pixels, the baseline that networks must beat on the phantom.

    maknet train --config linear --workdir runs/linear --config.data.path=demo/shards

Not part of the paper; for results see benchmarks/RESULTS.md.
"""

from maknet_jax.runs.config import load


def get_config():
    """The config smoke with 100 epochs: a linear model is cheap and converges slowly."""
    config = load("smoke")
    config.epochs = 100.0
    config.model = {"name": "linear", "options": {"edge": 32}}  # edge in pixels
    config.optimizer.learning_rate = 0.001
    config.optimizer.weight_decay = 0.01
    config.evaluate_every = 10.0  # epochs
    config.checkpoint_every = 1000  # steps
    config.log_every = 50  # steps
    return config
