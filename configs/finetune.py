"""Your own labelled slices on a trunk that was trained on more: some 500 images are enough to try.

    maknet prepare table labels.csv --out shards/mine
    maknet train --config finetune --workdir runs/mine --config.data.path=shards/mine \\
        --config.init.path=runs/teacher

init.path is any run, or a file of `maknet import-weights`; model.name is that network. The trunk
learns at a tenth of the head's rate; `--config.optimizer.trunk_rate=0` freezes it, its statistics
too. It reproduces nothing of the paper: all numbers are ours.
"""

from ml_collections import ConfigDict


def get_config():
    """30 epochs; 500 images at batch 32: 469 steps."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 30.0,
            "precision": "auto",  # bfloat16 activations on GPU and TPU, float32 on CPU; ours
            "data": {
                "path": "shards/mine",
                "train_split": "train",
                "val_split": "val",
                "size": 256,  # pixels
                "window": (-1024.0, 3071.0),  # HU mapped to 0..1; LesaNet's
                "batch_size": 32,  # over all devices
                "threads": 4,  # that read and decompress, a process
            },
            "pseudo": {
                "path": "",  # folder of `maknet pseudo-label`; "" trains on labelled images only
                "batch_size": 64,  # beside the labelled ones, in every step
                "balance": 0,  # images of each label an epoch; 0 takes all images once
            },
            "model": {"name": "maknet", "options": {"dropout_rate": 0.5}},  # or vgg16, resnet18
            "init": {
                "path": "",  # "": random weights; else a workdir or a file of import-weights
                "head": False,  # True: a workdir's classifier and spl too, for the same labels
            },
            "loss": {
                "name": "weighted_focal",
                "gamma": 2.0,  # ours: focal loss' default
                "clamp": 300.0,  # LesaNet's
                "head_weights": (1.0, 1.0),  # before and after score propagation; LesaNet's
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.01,  # of the head
                "decay_from": 2 / 3,  # share of the steps: after two thirds it falls
                "drop": 0.1,  # what the learning rate is multiplied by from there on
                "momentum": 0.9,  # this and the rest, but for trunk_rate: LesaNet's
                "clip": 10.0,  # largest norm of the gradients
                "weight_decay": 1e-4,  # not of biases
                "bias_rate": 2.0,  # times the learning rate
                "trunk_rate": 0.1,  # times the learning rate of trunk layers; 0 freezes them
            },
            "augment": {
                "rotation_probability": 0.5,
                "rotation_degrees": 15.0,  # to either side
                "crop_probability": 0.5,
                "crop_scale": (0.6, 1.0),  # share of the area
                "crop_aspect": (0.8, 1.25),  # width over height
                "contrast_probability": 0.0,
                "grayscale_probability": 0.0,
            },
            "ema_decay": 0.0,  # of an average that is scored instead of the weights; 0: none
            "evaluate_every": 1.0,  # epochs; best and last checkpoints are kept
            "checkpoint_every": 500,  # steps between checkpoints beside those
            "log_every": 20,  # steps
        }
    )
