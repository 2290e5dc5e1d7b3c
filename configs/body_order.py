"""Where in the body a slice lies, learned from a few slices whose order is known.

    python benchmarks/experiments/body_order.py --table FOLDER slices.csv
    maknet prepare table slices.csv --out shards/slices --size 64 --png-window=-175,275
    maknet train --config body_order --workdir runs/slices --config.data.path=shards/slices
    maknet predict OTHER --workdir runs/slices --png-window=-175,275 --json --out slices.csv

Label k says that the slice lies beyond threshold k of 19; the mean of the confidences is the
position, 0 to 1. The same in one command, with a CSV of positions:

    python benchmarks/experiments/body_order.py --train FOLDER --predict OTHER --out positions.csv

Expect Spearman 0.90 as the mean of five folds by patient (0.59 to 1.0), 0.86 over all slices: a
slice at the shoulders of which there is one only is taken for hips.
"""

from ml_collections import ConfigDict


def get_config():
    """Smoke's network; 200 epochs of 50 slices are 625 steps, a few minutes on CPU."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 200.0,
            "precision": "auto",
            "data": {
                "path": "shards/slices",
                "train_split": "train",
                "val_split": "val",  # there is none: the last weights count
                "size": 64,  # pixels
                "window": (-175.0, 275.0),  # HU mapped to 0..1; the 8-bit slices hold no others
                "batch_size": 16,
                "threads": 2,
            },
            "pseudo": {
                "path": "",
                "batch_size": 16,
                "balance": 0,
            },
            "model": {
                "name": "maknet",
                "options": {
                    "stem": 32,
                    "blocks": (3, 3, 3),
                    "growth_rates": (32, 32, 32),
                    "widths": (64, 96, 128),
                    "kernel_size": 3,
                    "form": "auto",  # of MAKConv: matmul on CPU, fused elsewhere
                    "dropout_rate": 0.0,
                    "mixpool_learned": True,
                },
            },
            "init": {
                "path": "",  # a workdir that was trained on the phantom
                "head": False,
            },
            "loss": {
                "name": "weighted_focal",
                "gamma": 0.0,  # cross entropy: no threshold is an easy example
                "clamp": 300.0,
                "head_weights": (1.0, 1.0),
            },
            "optimizer": {
                "name": "ranger",
                "learning_rate": 0.003,
                "decay_from": 0.3,  # share of the steps; then it falls to 0
                "b1": 0.95,
                "b2": 0.999,
                "eps": 1e-5,
                "alpha": 0.5,
                "k": 6,
                "weight_decay": 0.0,
                "centralize": False,
            },
            "augment": {
                "rotation_probability": 0.7,
                "rotation_degrees": 15.0,
                "crop_probability": 0.8,
                "crop_scale": (0.85, 1.0),
                "crop_aspect": (0.8, 1.25),
                "contrast_probability": 0.2,
                "grayscale_probability": 1.0,  # single slices have no neighbours
            },
            "ema_decay": 0.0,
            "evaluate_every": 1000.0,  # epochs
            "checkpoint_every": 10_000,  # steps
            "log_every": 50,  # steps
        }
    )
