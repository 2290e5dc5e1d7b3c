"""LesaNet fine-tuned on DeepLesion (section 4.5, table 3): 171 labels of lesions.

    maknet prepare deeplesion --lesions ... --out shards/lesions
    maknet train --config lesanet --workdir runs/lesanet --config.data.path=shards/lesions \\
        --config.init.path=runs/vgg16-tcia

init.path is a workdir of `vgg16_pretrain`, or ImageNet weights from `maknet import-weights`. Expect
AUC 0.933 and F1 0.357 on the text-mined test set, 0.940 and 0.497 on the hand-labelled one; with
ImageNet weights 0.934 and 0.342, 0.940 and 0.434 (the paper's numbers, not yet reproduced here).

Training follows LesaNet's published code, except: learning rate 0.001, the paper's, instead of
0.01; best checkpoint by validation AUC instead of mean F1 per label; inputs in 0..1 without
subtracting 50/255; all ancestors of uncertain labels are unknown instead of their parents only, and
unknown elements do not count in the mean; batches cross epochs instead of dropping the last
incomplete one (2,250 steps); ImageNet weights are actually loaded. For patches see
maknet_jax/data/lesions.py.
"""

from maknet_jax.runs.config import load


def get_config():
    """15 epochs of 19,221 lesions (some are noisy) at batch size 128: 2,252 steps."""
    config = load("teacher")
    config.data.path = "shards/lesions"
    config.data.size = 120  # pixels of 1 mm
    config.data.batch_size = 128
    config.model = {
        "name": "lesanet",
        "options": {
            "trunk": "vgg16",  # or resnet18, maknet: the network of init.path
            "trunk_options": {},  # its options, where they are not the defaults
            "units": 256,  # outputs of each of the five scales
            "embedding": 256,  # length of the embedding
        },
    }
    config.loss = {
        "name": "lesion",
        "clamp": 300.0,  # largest weight of the positives of a label
        "head_weights": (1.0, 1.0),  # before and after score propagation
        "rhem_weight": 1.0,  # of the cross entropy of hard examples
        "rhem_power": 2.0,  # draw probability is proportional to the error to this power
        "rhem_draws": 10000,  # per step
        "triplet_weight": 5.0,
        "triplet_margin": 0.1,  # between the distances
        "triplets": 5000,  # per step
    }
    config.optimizer = {
        "name": "sgd",
        "learning_rate": 0.001,  # the paper's
        "decay_from": 2 / 3,  # share of the steps before it drops: epoch 10 of 15
        "drop": 0.1,  # factor of that drop
        "momentum": 0.9,
        "clip": 10.0,  # largest norm of all gradients together
        "weight_decay": 1e-4,  # not applied to biases
        "bias_rate": 2.0,  # factor of the learning rate for biases
        "trunk_rate": 1.0,  # factor of the learning rate for the trunk; 0 freezes it
    }
    return config
