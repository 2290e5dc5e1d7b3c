"""ResNet18 with score propagation, trained like the teacher (section 4.3, table 1): 11.25 M.

    maknet train --config resnet18 --workdir runs/resnet18 --config.data.path=shards/deeplesion

Expect AUC 0.899 and F1 0.20 on the text-mined test set, 0.902 and 0.27 on the hand-labelled one
(the paper's numbers, not yet reproduced here).
"""

from maknet_jax.runs.config import load


def get_config():
    """The teacher with another model."""
    config = load("teacher")
    config.model = {"name": "resnet18", "options": {"dropout_rate": 0.0}}
    return config
