"""Your own labelled slices, starting from weights trained on more data; 500 images are a start.

    maknet prepare table labels.csv --out shards/mine
    maknet train --config finetune --workdir runs/mine --config.data.path=shards/mine \\
        --config.init.path=runs/teacher

init.path is any workdir, a bundle, a released model or a file of `maknet import-weights`; the
network is the one that it holds, whatever its widths. `--config.init.shared_labels=True` keeps the
scores of labels that both data sets have; the head is new otherwise. The trunk learns at a tenth of
the head's rate; `--config.optimizer.trunk_rate=0` freezes it together with its BatchNorm
statistics. It reproduces nothing of the paper: all numbers are our choice.
"""

from maknet_jax.runs.config import load


def get_config():
    """30 epochs; 500 images at batch size 32 are 469 steps."""
    config = load("teacher")
    config.epochs = 30.0
    config.data.path = "shards/mine"
    config.data.batch_size = 32
    # The network of init.path; options that are listed here replace its own.
    config.model = {"name": "from_init", "options": {"dropout_rate": 0.5}}
    config.optimizer = load("lesanet").optimizer  # SGD as in LesaNet, which explains its fields
    config.optimizer.learning_rate = 0.01  # of the head
    config.optimizer.trunk_rate = 0.1  # factor of it for the trunk; 0 freezes the trunk
    config.augment.rotation_probability = 0.5
    config.augment.crop_probability = 0.5
    return config
