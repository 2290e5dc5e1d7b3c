"""The position of a slice along the body, learned from a few slices whose order is known.

    python benchmarks/experiments/body_order.py --table FOLDER slices.csv
    maknet prepare table slices.csv --out shards/slices --size 64 --png-window=-175,275
    maknet train --config body_order --workdir runs/slices --config.data.path=shards/slices
    maknet predict OTHER --workdir runs/slices --png-window=-175,275 --json --out slices.csv

Label k of 19 says that the slice lies beyond threshold k; the mean of the confidences is the
position, 0 to 1. `body_order.py --train FOLDER --predict OTHER --out positions.csv` runs all
steps. Expect Spearman 0.90 as the mean of five folds by patient (0.59 to 1.0) and 0.86 over all
slices: the only shoulder slice is mistaken for hips. Not part of the paper.
"""

from maknet_jax.runs.config import load


def get_config():
    """The network of smoke; 200 epochs of 50 slices are 625 steps, a few minutes on CPU."""
    config = load("smoke")
    config.epochs = 200.0
    config.data.path = "shards/slices"  # no split val, so the last weights are used
    config.data.size = 64  # pixels
    config.data.window = (-175.0, 275.0)  # HU; the 8-bit slices hold no other values
    config.data.batch_size = 16
    config.pseudo.batch_size = 16
    config.loss.gamma = 0.0  # cross entropy: no label is an easy one
    config.optimizer.learning_rate = 0.003
    config.optimizer.decay_from = 0.3  # share of the steps before it decays to 0
    config.augment.update(rotation_probability=0.7, crop_probability=0.8)
    config.augment.crop_scale = (0.85, 1.0)  # share of the area
    config.augment.contrast_probability = 0.2
    config.augment.grayscale_probability = 1.0  # single slices have no neighbours
    config.evaluate_every = 1000.0  # epochs
    config.checkpoint_every = 10_000  # steps
    config.log_every = 50  # steps
    return config
