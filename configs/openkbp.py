"""Seven organs of head, neck and upper chest on real patients (OpenKBP): the released `head-neck`.

    maknet prepare segmentations openkbp/train test=openkbp/validation --out shards/openkbp \\
        --shares train=0.82,val=0.18 --unknown-below spinal_cord,esophagus --every 3 --size 128 \\
        --source "OpenKBP: head, neck, upper chest"
    maknet train --config openkbp --workdir runs/openkbp --config.data.path=shards/openkbp
    maknet export runs/openkbp --out head-neck --dtype float16

data/README.md says how to obtain the data. The learning rate and the number of epochs were chosen
on the tuning patients at 64 x 64 (benchmarks/experiments/table1_patients.py); the rest is the
student's noise of the paper, without dropout. Expect AUC 0.985 and F1 0.895 on OpenKBP's validation
patients. Not part of the paper.
"""

from maknet_jax.runs.config import load


def get_config():
    """12 epochs of 4,054 slices of 140 patients at batch size 32: 1,520 steps."""
    config = load("teacher")
    config.epochs = 12.0
    config.data.update(path="shards/openkbp", size=128, batch_size=32)
    config.augment = load("student").augment
    config.optimizer.decay_from = 0.3  # share of the steps before it decays to 0
    config.checkpoint_every = 100  # steps
    return config
