"""A small teacher for the phantom and for tests: 96 x 96, a narrower MAKNet, minutes on CPU.

    maknet train --config smoke --workdir runs/smoke --config.data.path=demo/shards

The default data are those of `make demo`; for results see benchmarks/RESULTS.md. Not part of the
paper.
"""

from ml_collections import ConfigDict


def get_config():
    """Batch size 32, so that a few hundred images still give enough steps."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 20.0,  # passes over the labelled images
            "precision": "auto",  # of activations: bfloat16 on GPU and TPU, float32 on CPU
            "data": {
                "path": "demo/shards",  # folder written by `maknet prepare`
                "train_split": "train",
                "val_split": "val",  # chooses the best checkpoint and the thresholds
                "size": 96,  # height and width in pixels
                "window": (-1024.0, 3071.0),  # HU, mapped to 0..1 and clipped
                "batch_size": 32,  # labelled images per step, over all devices
                "threads": 2,  # per process, to read and decompress
            },
            "pseudo": {
                "path": "",  # folder written by `maknet pseudo-label`; "": labelled images only
                "batch_size": 64,  # pseudo-labelled images per step
                "balance": 0,  # images per label and epoch; 0 uses every image once
            },
            "model": {
                "name": "maknet",
                "options": {
                    "stem": 32,  # channels of the first convolution
                    "blocks": (3, 3, 3),  # layers per dense block
                    "growth_rates": (32, 32, 32),  # channels added by each layer of a block
                    "widths": (64, 96, 128),  # output channels of each block
                    "kernel_size": 3,
                    "form": "auto",  # of MAKConv: matmul on CPU, fused elsewhere
                    "dropout_rate": 0.0,  # before the classifier
                    "mixpool_learned": True,
                },
            },
            "init": {
                "path": "",  # workdir, bundle, or file of `import-weights`; "": random weights
                "head": False,  # True also takes its classifier; needs the same labels
                "shared_labels": False,  # True takes the classifier's part for labels of both
            },
            "loss": {
                "name": "weighted_focal",
                "gamma": 2.0,  # 0 is cross entropy
                "clamp": 300.0,  # largest weight of the positives of a label
                "head_weights": (1.0, 1.0),  # before and after score propagation
            },
            "optimizer": {
                "name": "ranger",
                "learning_rate": 0.01,
                "decay_from": 1.0,  # share of the steps before it decays to 0; 1 keeps it constant
                "b1": 0.95,  # decay of the first moment
                "b2": 0.999,  # decay of the second moment
                "eps": 1e-5,
                "alpha": 0.5,  # step of the slow weights in lookahead
                "k": 6,  # steps between two lookahead updates
                "weight_decay": 0.0,
                "centralize": False,  # gradient centralisation
            },
            "augment": {
                "rotation_probability": 0.0,
                "rotation_degrees": 15.0,  # largest angle in either direction
                "translation_probability": 0.0,
                "translation_range": 0.1,  # largest shift in each direction; share of the edge
                "crop_probability": 0.0,
                "crop_scale": (0.6, 1.0),  # share of the area
                "crop_aspect": (0.8, 1.25),  # width over height
                "contrast_probability": 0.0,
                "grayscale_probability": 0.0,
            },
            "domain_components": 64,  # of the out-of-domain statistics, at most 64; 0 writes none
            "ema_decay": 0.0,  # above 0: scores a moving average of the weights with this decay
            "accumulate": 1,  # parts of a batch that are processed one after the other
            "remat": False,  # True: less memory, more time, the same values
            "evaluate_every": 2.0,  # epochs
            "checkpoint_every": 200,  # steps, in addition to a checkpoint after each evaluation
            "checkpoint_minutes": 30.0,  # and after this time; 0: by steps only
            # Steps whose gradient is not finite are skipped; this many in a row stop the
            # training. 0 skips none, and a loss that is not finite stops it.
            "skip_nonfinite": 10,
            "log_every": 10,  # steps
        }
    )
