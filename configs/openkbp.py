"""Seven organs of head, neck and upper chest on real patients (OpenKBP): the released network.

    maknet prepare segmentations openkbp/train test=openkbp/validation --out shards/openkbp \\
        --shares train=0.82,val=0.18 --unknown-below spinal_cord,esophagus --every 3 --size 64 \\
        --source "OpenKBP: head, neck, upper chest"
    maknet train --config openkbp --workdir runs/openkbp --config.data.path=shards/openkbp

data/README.md says how to obtain the data.
"""

from maknet_jax.runs.config import load


def get_config():
    """12 epochs of 4,054 slices of 140 patients at batch size 32: 1,520 steps."""
    config = load("teacher")
    config.epochs = 12.0
    config.data.update(path="shards/openkbp", size=64, batch_size=32)
    config.augment = load("student").augment
    config.optimizer.learning_rate = 0.003
    config.optimizer.decay_from = 0.3  # share of the steps before it decays to 0
    config.checkpoint_every = 200  # steps
    return config
