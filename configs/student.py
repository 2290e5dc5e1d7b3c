"""The noisy student of the paper (sections 4.2 and 4.4, table 2): one round.

    maknet noisy-student --config noisy_student --workdir runs/ns         # all rounds
    maknet train --config student --workdir runs/student-1 --config.data.path=shards/deeplesion \\
        --config.pseudo.path=shards/pseudo-1

64 labelled and 64 pseudo-labelled images per step. Noise: rotation, grayscale, auto-contrast,
random resized crop, dropout 0.5 (section 4.2) and translation (section 4.4); ranges and
probabilities are our choice. Expect, after round 1, AUC 0.907 and F1 0.22 on the text-mined test
set, 0.915 and 0.31 on the hand-labelled one (the paper's numbers, not yet reproduced here).
"""

from maknet_jax.runs.config import load


def get_config():
    """100 epochs of 17,697 lesions at batch size 64: 27,652 steps, 3.5 epochs of 500k images."""
    config = load("teacher")
    config.epochs = 100.0
    config.pseudo.path = "shards/pseudo-1"
    config.model.options.dropout_rate = 0.5
    for kind in ("rotation", "translation", "crop"):
        config.augment[f"{kind}_probability"] = 0.5
    config.augment.update(contrast_probability=0.2, grayscale_probability=0.2)
    return config
