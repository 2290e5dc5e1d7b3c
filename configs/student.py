"""The noisy student of the paper (sections 4.2 and 4.4, table 2): one round.

    maknet noisy-student --config noisy_student --workdir runs/ns         # all rounds
    maknet train --config student --workdir runs/student-1 --config.data.path=shards/deeplesion \\
        --config.pseudo.path=shards/pseudo-1

64 labelled and 64 pseudo-labelled images a step. Noise: rotation, grayscale, auto-contrast, random
resized crop, dropout 0.5; their ranges and probabilities are ours. Expect, after round 1, AUC 0.907
and F1 0.22 on the text-mined test set, 0.915 and 0.31 on the hand-labelled one (the paper's; not
yet measured here, it needs the full DeepLesion). "Ours" marks what the paper leaves open.
"""

from ml_collections import ConfigDict


def get_config():
    """100 epochs of 17,697 lesions at batch 64: 27,652 steps, 3.5 epochs of 500k images."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 100.0,
            "precision": "auto",  # bfloat16 activations on GPU and TPU, float32 on CPU; ours
            "data": {
                "path": "shards/deeplesion",
                "train_split": "train",
                "val_split": "val",
                "size": 256,  # pixels
                "window": (-1024.0, 3071.0),  # HU mapped to 0..1; LesaNet's
                "batch_size": 64,  # over all devices
                "threads": 4,  # that read and decompress, a process
            },
            "pseudo": {
                "path": "shards/pseudo-1",  # folder of `maknet pseudo-label`
                "batch_size": 64,  # beside the labelled ones, in every step
                "balance": 0,  # images of each label an epoch; 0 takes all images once
            },
            "model": {
                "name": "maknet",
                "options": {
                    "stem": 32,  # widths are ours, see models/maknet.py
                    "blocks": (3, 3, 6, 6),
                    "growth_rates": (16, 32, 112, 160),
                    "widths": (64, 128, 256, 384),
                    "kernel_size": 3,  # ours
                    "form": "auto",  # of MAKConv: matmul on CPU, fused elsewhere
                    "dropout_rate": 0.5,
                    "mixpool_learned": True,  # ours
                },
            },
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
                "name": "ranger",
                "learning_rate": 0.01,
                "decay_from": 1.0,  # share of the steps; 1 keeps it constant, as the paper has it
                "b1": 0.95,  # this and the rest: Ranger's defaults of January 2020
                "b2": 0.999,
                "eps": 1e-5,
                "alpha": 0.5,  # of lookahead
                "k": 6,  # steps between lookahead's
                "weight_decay": 0.0,
                "centralize": False,  # came to Ranger after the paper
            },
            "augment": {
                "rotation_probability": 0.5,
                "rotation_degrees": 15.0,  # to either side
                "crop_probability": 0.5,
                "crop_scale": (0.6, 1.0),  # share of the area
                "crop_aspect": (0.8, 1.25),  # width over height
                "contrast_probability": 0.2,
                "grayscale_probability": 0.2,
            },
            "ema_decay": 0.0,  # of an average that is scored instead of the weights; 0: none
            "evaluate_every": 1.0,  # epochs; best and last checkpoints are kept
            "checkpoint_every": 500,  # steps between checkpoints beside those
            "log_every": 20,  # steps
        }
    )
