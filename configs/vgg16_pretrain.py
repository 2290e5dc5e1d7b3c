"""VGG16 on pseudo-labelled CT, the base of LesaNet in section 4.5 and table 3.

    maknet train --config vgg16_pretrain --workdir runs/vgg16-tcia \\
        --config.data.path=shards/deeplesion --config.pseudo.path=shards/pseudo-5
    maknet train --config lesanet --workdir runs/lesanet-tcia \\
        --config.data.path=shards/lesions --config.init.path=runs/vgg16-tcia

5 epochs of 500,000 pseudo-labelled images. Every step of ours has labelled images too: 8 of them
beside 120. Epochs below are of the 17,697 labelled ones: 5 x (pseudo-labelled images) x 8 / 120 /
17,697. The paper gives no numbers for this network. All but batches and epochs is `vgg16.py`.
"""

from ml_collections import ConfigDict


def get_config():
    """20,838 steps of 120 pseudo-labelled and 8 labelled images."""
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 9.42,  # of labelled images: 5 of 500,000 pseudo-labelled ones
            "precision": "auto",  # bfloat16 activations on GPU and TPU, float32 on CPU; ours
            "data": {
                "path": "shards/deeplesion",
                "train_split": "train",
                "val_split": "val",
                "size": 256,  # pixels
                "window": (-1024.0, 3071.0),  # HU mapped to 0..1; LesaNet's
                "batch_size": 8,  # over all devices
                "threads": 4,  # that read and decompress, a process
            },
            "pseudo": {
                "path": "shards/pseudo-5",  # folder of `maknet pseudo-label`
                "batch_size": 120,  # beside the labelled ones, in every step
                "balance": 0,  # images of each label an epoch; 0 takes all images once
            },
            "model": {"name": "vgg16", "options": {"dropout_rate": 0.0}},
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
