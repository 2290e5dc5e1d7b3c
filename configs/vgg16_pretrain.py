"""VGG16 on pseudo-labelled CT, the initial weights of LesaNet in section 4.5 and table 3.

    maknet train --config vgg16_pretrain --workdir runs/vgg16-tcia \\
        --config.data.path=shards/deeplesion --config.pseudo.path=shards/pseudo-5
    maknet train --config lesanet --workdir runs/lesanet-tcia \\
        --config.data.path=shards/lesions --config.init.path=runs/vgg16-tcia

The paper trains for 5 epochs on 500,000 pseudo-labelled images and gives no numbers for this
network. Our steps always contain labelled images: 8, beside 120 pseudo-labelled ones. Epochs count
the 17,697 labelled images, so they are 5 x 500,000 x 8 / 120 / 17,697.
"""

from maknet_jax.runs.config import load


def get_config():
    """20,838 steps of 120 pseudo-labelled and 8 labelled images."""
    config = load("teacher")
    config.model = load("vgg16").model
    config.epochs = 9.42  # passes over the labelled images
    config.data.batch_size = 8
    config.pseudo.update(path="shards/pseudo-5", batch_size=120)
    return config
