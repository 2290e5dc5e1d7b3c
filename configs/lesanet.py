"""LesaNet fine-tuned on DeepLesion (section 4.5, table 3): 171 labels of lesions.

    maknet prepare deeplesion --lesions ... --out shards/lesions
    maknet train --config lesanet --workdir runs/lesanet --config.data.path=shards/lesions \\
        --config.init.path=runs/vgg16-tcia

init.path is a run of `vgg16_pretrain`, or ImageNet's weights (`maknet import-weights`). Expect AUC
0.933 and F1 0.357 on the text-mined test set, 0.940 and 0.497 on the hand-labelled one; with
ImageNet's 0.934 and 0.342, 0.940 and 0.434 (the paper's; not yet measured here, it needs the full
DeepLesion). LesaNet itself trains at 0.01. All but the learning rate is LesaNet's.
"""

from ml_collections import ConfigDict


def get_config():
    """15 epochs of 19,221 lesions (some are noisy) at batch 128: 2,252 steps."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 15.0,
            "precision": "auto",  # bfloat16 activations on GPU and TPU, float32 on CPU; ours
            "data": {
                "path": "shards/lesions",
                "train_split": "train",
                "val_split": "val",
                "size": 120,  # pixels of 1 mm
                "window": (-1024.0, 3071.0),  # HU mapped to 0..1; LesaNet's
                "batch_size": 128,  # over all devices; LesaNet's
                "threads": 4,  # that read and decompress, a process
            },
            "pseudo": {
                "path": "",  # folder of `maknet pseudo-label`; "" trains on labelled images only
                "batch_size": 64,  # beside the labelled ones, in every step
                "balance": 0,  # images of each label an epoch; 0 takes all images once
            },
            "model": {
                "name": "lesanet",
                "options": {
                    "trunk": "vgg16",  # or resnet18, maknet: of init.path
                    "trunk_options": {},  # as trunk_options.blocks=3,3,3, where not the defaults
                    "units": 256,  # of each of the five scales
                    "embedding": 256,
                },
            },
            "init": {
                "path": "",  # "": random weights; else a workdir or a file of import-weights
                "head": False,  # True: a workdir's classifier and spl too, for the same labels
            },
            "loss": {
                "name": "lesion",
                "clamp": 300.0,  # this and the rest: LesaNet's
                "head_weights": (1.0, 1.0),  # before and after score propagation
                "rhem_weight": 1.0,  # of the cross entropy of hard examples
                "rhem_power": 2.0,
                "rhem_draws": 10000,  # a step
                "triplet_weight": 5.0,
                "triplet_margin": 0.1,
                "triplets": 5000,  # a step
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.001,  # the paper's
                "decay_from": 2 / 3,  # share of the steps: epoch 10 of 15, LesaNet's
                "drop": 0.1,  # what the learning rate is multiplied by from there on
                "momentum": 0.9,  # this and the rest, but for trunk_rate: LesaNet's
                "clip": 10.0,  # largest norm of the gradients
                "weight_decay": 1e-4,  # not of biases
                "bias_rate": 2.0,  # times the learning rate
                "trunk_rate": 1.0,  # times the learning rate of trunk layers; 0 freezes them
            },
            "augment": {
                "rotation_probability": 0.0,
                "rotation_degrees": 15.0,  # to either side
                "crop_probability": 0.0,
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
