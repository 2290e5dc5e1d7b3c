"""Prepared phantom lesions and configs of tiny LesaNets, for the tests that train them."""

import ml_collections

from maknet_jax import prepare
from maknet_jax.runs import config as configs

TRUNK = {"stem": 16, "blocks": (1, 1, 1), "growth_rates": (16, 16, 16), "widths": (16, 24, 32)}


def write(phantom, out, size):
    """Prepares the phantom's lesions as patches of `size` mm; returns `out`."""
    files = {name: phantom[name] for name in ("hand_labels", "ontology")}
    prepare.prepare_deeplesion(
        phantom["images"],
        phantom["info"],
        out,
        label_file=phantom["labels"],
        patches=True,
        size=size,
        **files,
    )
    return out


def make_config(data, size, **changes):
    """The config `lesanet` with a tiny MAKNet trunk; `changes` maps dotted fields to values."""
    plain = configs.load("lesanet").to_dict()
    plain["model"]["options"] = {
        "trunk": "maknet",
        "trunk_options": TRUNK,
        "units": 32,
        "embedding": 32,
    }
    values = {
        "data.path": str(data),
        "data.size": size,
        "data.batch_size": 16,
        "epochs": 2.0,
        "checkpoint_every": 1000,
        "log_every": 5,
    }
    for key, value in (values | changes).items():
        *parents, last = key.split(".")
        node = plain
        for part in parents:
            node = node[part]
        assert last in node, key
        node[last] = value
    return ml_collections.ConfigDict(plain).lock()
