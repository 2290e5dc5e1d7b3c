"""The teacher of the paper (sections 4.2 and 4.3, row MAKNet of table 1).

    maknet train --config teacher --workdir runs/teacher --config.data.path=shards/deeplesion

Expect AUC 0.905 and F1 0.21 on the text-mined test set, 0.910 and 0.28 on the hand-labelled one
(the paper's numbers, not yet reproduced here). No augmentation and no dropout: the paper adds noise
to the student only. "Our choice" marks what the paper leaves open. Every field is listed here.
"""

from ml_collections import ConfigDict


def get_config():
    """15 epochs of 17,697 lesions at batch size 64: 4,148 steps."""
    return ConfigDict(
        {
            "seed": 0,  # of the initial weights, the order of the images and all noise
            "epochs": 15.0,  # passes over the labelled images
            "precision": "auto",  # bfloat16 activations on GPU and TPU, else float32; our choice
            "data": {
                "path": "shards/deeplesion",  # folder written by `maknet prepare`
                "train_split": "train",
                "val_split": "val",  # for thresholds and, our choice, the checkpoint of best AUC
                "size": 256,  # height and width in pixels
                "window": (-1024.0, 3071.0),  # HU, mapped to 0..1 and clipped; as in LesaNet
                "batch_size": 64,  # labelled images per step, over all devices
                "threads": 4,  # per process, to read and decompress
            },
            "pseudo": {
                "path": "",  # folder written by `maknet pseudo-label`; "": labelled images only
                "batch_size": 64,  # pseudo-labelled images per step, over all devices
                "balance": 0,  # images per label and epoch; 0 uses every image once
            },
            "model": {
                "name": "maknet",  # or vgg16, resnet18, lesanet, linear: each has its own options
                "options": {
                    "stem": 32,  # channels of the first convolution; for widths see maknet.py
                    "blocks": (3, 3, 6, 6),  # layers per dense block
                    "growth_rates": (16, 32, 112, 160),  # channels added by each layer of a block
                    "widths": (64, 128, 256, 384),  # output channels of each block
                    "kernel_size": 3,  # of MAKConv; our choice
                    "form": "auto",  # of MAKConv: matmul on CPU, fused elsewhere
                    "dropout_rate": 0.0,  # before the classifier
                    "mixpool_learned": True,  # False mixes maximum and mean equally; our choice
                },
            },
            "init": {
                "path": "",  # workdir, bundle, or file of `import-weights`; "": random weights
                "head": False,  # True also takes its classifier; needs the same labels
                "shared_labels": False,  # True takes the classifier's part for labels of both
            },
            "loss": {
                "name": "weighted_focal",  # or lesion
                "gamma": 2.0,  # 0 is cross entropy; our choice: the default of focal loss
                "clamp": 300.0,  # largest weight of the positives of a label; as in LesaNet
                "head_weights": (1.0, 1.0),  # before and after score propagation; as in LesaNet
            },
            "optimizer": {
                "name": "ranger",  # or sgd
                "learning_rate": 0.01,
                "decay_from": 1.0,  # share of the steps before it decays to 0; 1 keeps it constant
                "b1": 0.95,  # decay of the first moment; these are Ranger's defaults of early 2020
                "b2": 0.999,  # decay of the second moment
                "eps": 1e-5,
                "alpha": 0.5,  # step of the slow weights in lookahead
                "k": 6,  # steps between two lookahead updates
                "weight_decay": 0.0,
                "centralize": False,  # gradient centralisation; added to Ranger after the paper
            },
            "augment": {
                "rotation_probability": 0.0,
                "rotation_degrees": 15.0,  # largest angle in either direction
                "translation_probability": 0.0,
                "translation_range": 0.1,  # largest shift in each direction; share of the edge
                "crop_probability": 0.0,
                "crop_scale": (0.6, 1.0),  # share of the area
                "crop_aspect": (0.8, 1.25),  # width over height
                "contrast_probability": 0.0,  # of auto-contrast over the three slices jointly
                "grayscale_probability": 0.0,  # of the middle slice in all channels
            },
            "domain_components": 64,  # of the out-of-domain statistics, at most 64; 0 writes none
            "ema_decay": 0.0,  # above 0: scores a moving average of the weights with this decay
            # A batch is processed in this many equal parts, whose gradients are added: memory for
            # one part. Without BatchNorm the result is that of 1. BatchNorm takes the statistics
            # of each part, and the running ones move once per step, by the mean over the parts.
            "accumulate": 1,
            # True computes the activations inside a block again in the backward pass: less memory,
            # more time, the same values. May be switched on resume.
            "remat": False,
            "evaluate_every": 1.0,  # epochs
            "checkpoint_every": 500,  # steps, in addition to a checkpoint after each evaluation
            "checkpoint_minutes": 30.0,  # and after this time; 0: by steps only
            # Steps whose gradient is not finite are skipped; this many in a row stop the
            # training. 0 skips none, and a loss that is not finite stops it.
            "skip_nonfinite": 10,
            "log_every": 20,  # steps
        }
    )
