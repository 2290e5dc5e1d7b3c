"""Fine-tuning on your own labelled slices, for example 500 of them.

    maknet prepare table labels.csv --out shards/mine
    maknet train --config finetune --workdir runs/mine --config.data.path=shards/mine \\
        --config.init.path=runs/teacher

init.path is a workdir, a bundle, a released model or a file of `maknet import-weights`; the
network and its widths are taken from it. The head is new; `--config.init.shared_labels=True` keeps
the part of the old head for labels that both data sets have. The trunk's learning rate is a tenth
of the head's; `--config.optimizer.trunk_rate=0` freezes the trunk together with its BatchNorm
statistics. Not part of the paper: all numbers are our choice.
"""

from maknet_jax.runs.config import load


def get_config():
    """30 epochs; 500 images at batch size 32 are 469 steps."""
    config = load("teacher")
    config.epochs = 30.0
    config.data.update(path="shards/mine", batch_size=32)
    # The network of init.path; the options listed here override its own.
    config.model = {"name": "from_init", "options": {"dropout_rate": 0.5}}
    config.optimizer = load("lesanet").optimizer  # SGD; lesanet.py explains its fields
    config.optimizer.learning_rate = 0.01  # of the head
    config.optimizer.trunk_rate = 0.1  # factor of the learning rate for the trunk; 0 freezes it
    config.augment.update(rotation_probability=0.5, crop_probability=0.5)
    return config
