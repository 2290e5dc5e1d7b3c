"""A small noisy student: the config smoke with the student's noise and pseudo-labels.

    maknet noisy-student --config noisy_student --workdir runs/ns --config.teacher=smoke \\
        --config.student=smoke_student --config.labelled=demo/shards \\
        --config.unlabelled=demo/unlabelled

It shows on the phantom that the rounds work; for their gain see benchmarks/RESULTS.md.
"""

from maknet_jax.runs.config import load


def get_config():
    """32 labelled and 32 pseudo-labelled images per step."""
    config = load("smoke")
    config.epochs = 40.0
    config.pseudo.update(path="shards/pseudo-1", batch_size=32)
    config.model.options.dropout_rate = 0.5
    config.augment = load("student").augment
    return config
