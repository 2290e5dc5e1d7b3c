"""VGG16 with BatchNorm, trained like the teacher (section 4.3, table 1): 14.78 M parameters.

    maknet train --config vgg16 --workdir runs/vgg16 --config.data.path=shards/deeplesion

Expect AUC 0.891 and F1 0.18 on the text-mined test set, 0.903 and 0.24 on the hand-labelled one
(the paper's numbers, not yet reproduced here).
"""

from maknet_jax.runs.config import load


def get_config():
    """The teacher with another model."""
    config = load("teacher")
    config.model = {"name": "vgg16", "options": {"dropout_rate": 0.0}}
    return config
