"""A linear model on 32 x 32 pixels: what the networks must beat. The smoke recipe, another model.

maknet train --config linear --workdir runs/linear --config.data.path=demo/shards
"""

from ml_collections import ConfigDict


def get_config():
    """The smoke recipe with 100 epochs: a linear model is cheap and converges slowly."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 100.0,
            "precision": "auto",
            "data": {
                "path": "demo/shards",
                "train_split": "train",
                "val_split": "val",
                "size": 96,  # pixels
                "window": (-1024.0, 3071.0),  # HU mapped to 0..1
                "batch_size": 32,
                "threads": 2,
            },
            "pseudo": {
                "path": "",
                "batch_size": 64,
                "balance": 0,
            },
            "model": {"name": "linear", "options": {"edge": 32}},
            "init": {
                "path": "",  # "": random weights; else a workdir or a file of import-weights
                "head": False,  # True: a workdir's classifier and spl too, for the same labels
            },
            "loss": {
                "name": "weighted_focal",
                "gamma": 2.0,
                "clamp": 300.0,
                "head_weights": (1.0, 1.0),
            },
            "optimizer": {
                "name": "ranger",
                "learning_rate": 0.001,
                "decay_from": 1.0,  # share of the steps; 1 keeps it constant
                "b1": 0.95,
                "b2": 0.999,
                "eps": 1e-5,
                "alpha": 0.5,
                "k": 6,
                "weight_decay": 0.01,
                "centralize": False,
            },
            "augment": {
                "rotation_probability": 0.0,
                "rotation_degrees": 15.0,
                "crop_probability": 0.0,
                "crop_scale": (0.6, 1.0),
                "crop_aspect": (0.8, 1.25),
                "contrast_probability": 0.0,
                "grayscale_probability": 0.0,
            },
            "ema_decay": 0.0,
            "evaluate_every": 10.0,  # epochs
            "checkpoint_every": 1000,  # steps
            "log_every": 50,  # steps
        }
    )
