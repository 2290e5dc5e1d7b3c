"""Makes networks.npz: features of torch's VGG16-BN and ResNet18 trunks on weights drawn by NumPy.

    python tests/golden/make_networks_golden.py        # needs torch; made with torch 2.13.0

The networks are written here from torch.nn by the published description (torchvision's names).
"""

import pathlib

import numpy as np
import torch
from network_weights import draw, image
from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16BN(nn.Module):
    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for stage in STAGES:
            for features in stage:
                layers += [nn.Conv2d(width, features, 3, padding=1), nn.BatchNorm2d(features)]
                layers.append(nn.ReLU())
                width = features
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.features(x).mean((2, 3))


class Block(nn.Module):
    def __init__(self, width, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = nn.Identity()
        if stride != 1:
            shortcut = nn.Conv2d(width, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(features))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = 64
        for number, features in enumerate((64, 128, 256, 512)):
            first = Block(width, features, 2 if number else 1)
            stage = nn.Sequential(first, Block(features, features, 1))
            setattr(self, f"layer{number + 1}", stage)
            width = features

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


results = {}
for name, network in (("vgg16", VGG16BN()), ("resnet18", ResNet18())):
    weights = {
        key: torch.from_numpy(array)
        for key, array in draw(
            {key: tuple(value.shape) for key, value in network.state_dict().items()}
        ).items()
    }
    network.load_state_dict(weights)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    with torch.no_grad():
        x = torch.from_numpy(image().transpose(0, 3, 1, 2).copy())
        results[f"{name}_features"] = network.eval()(x).numpy()
    results[f"{name}_keys"] = np.array(list(shapes))
    results[f"{name}_shapes"] = np.array([",".join(map(str, shape)) for shape in shapes.values()])
np.savez_compressed(pathlib.Path(__file__).with_name("networks.npz"), **results)
print({name: array.shape for name, array in results.items()})
