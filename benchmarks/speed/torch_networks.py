"""The networks in PyTorch, and the process that against_pytorch.py times them in.

Needs torch and NumPy only. The modules carry the names of the Flax ones, so that weights go over by
name. Images are `[B, C, H, W]` in channels_last.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputNorm(nn.Module):
    """(images - mean) / std."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, x):
        """The same shape."""
        return (x - self.running_mean[:, None, None]) / self.std[:, None, None]


class ConvNorm(nn.Module):
    """A convolution without bias, and BatchNorm."""

    def __init__(self, width, features, kernel_size, stride=1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(width, features, kernel_size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x):
        """`[B, width, H, W]` -> `[B, features, H / stride, W / stride]`."""
        return self.norm(self.conv(x))


class MAKConv(nn.Module):
    """Four convolutions, k x k, 1 x k, k x 1 and 1 x 1, a quarter of the features each."""

    def __init__(self, width, features, k):
        super().__init__()
        sizes = {"kxk": (k, k), "1xk": (1, k), "kx1": (k, 1), "1x1": (1, 1)}
        for number, (name, size) in enumerate(sizes.items()):
            if share := (features + 3 - number) // 4:
                padding = (size[0] // 2, size[1] // 2)
                conv = nn.Conv2d(width, share, size, padding=padding, bias=False)
                self.add_module(f"conv_{name}", conv)

    def forward(self, x):
        """`[B, width, H, W]` -> `[B, features, H, W]`."""
        return torch.cat([conv(x) for conv in self.children()], 1)


class MixPool(nn.Module):
    """share * max pool + (1 - share) * average pool."""

    def __init__(self, learned):
        super().__init__()
        share = torch.tensor(0.5)
        self.share = nn.Parameter(share) if learned else 0.5

    def forward(self, x):
        """`[B, C, H, W]` -> `[B, C, H // 2, W // 2]`."""
        return self.share * F.max_pool2d(x, 2) + (1 - self.share) * F.avg_pool2d(x, 2)


class CBAM(nn.Module):
    """Attention over channels, then over places."""

    def __init__(self, channels, ratio=16):
        super().__init__()
        hidden = max(1, channels // ratio)
        self.mlp_hidden = nn.Linear(channels, hidden)
        self.mlp_output = nn.Linear(hidden, channels)
        self.places = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.places_norm = nn.BatchNorm2d(1)

    def forward(self, x):
        """The same shape."""
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))])
        attention = self.mlp_output(F.relu(self.mlp_hidden(pooled))).sum(0)
        x = x * torch.sigmoid(attention)[:, :, None, None]
        places = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.places_norm(self.places(places)))


class DenseBlock(nn.Module):
    """Densely connected MAKConvs, a 1 x 1 convolution and CBAM."""

    def __init__(self, width, layers, growth_rate, features, k):
        super().__init__()
        self.layers = layers
        for number in range(layers):
            self.add_module(f"makconv_{number}", MAKConv(width, growth_rate, k))
            self.add_module(f"norm_{number}", nn.BatchNorm2d(growth_rate))
            width += growth_rate
        self.transition = ConvNorm(width, features, 1)
        self.cbam = CBAM(features)

    def forward(self, x):
        """`[B, width, H, W]` -> `[B, features, H, W]`."""
        for number in range(self.layers):
            new = getattr(self, f"makconv_{number}")(x)
            x = torch.cat([x, F.mish(getattr(self, f"norm_{number}")(new))], 1)
        return self.cbam(F.mish(self.transition(x)))


class Head(nn.Module):
    """What the networks share: the classifier and, where there is one, score propagation."""

    def __init__(self, width, labels, dropout_rate, spl):
        super().__init__()
        self.input = InputNorm()
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(width, labels)
        self.spl = nn.ModuleDict({"dense": nn.Linear(labels, labels)}) if spl else None

    def scores(self, features):
        """`[B, width]` -> (logits, scores before score propagation or None), `[B, labels]`."""
        scores = self.classifier(self.dropout(features))
        return (scores, None) if self.spl is None else (self.spl["dense"](scores), scores)


class MAKNet(Head):
    """`maknet_jax.models.MAKNet`; `form` only says how XLA should compute it."""

    def __init__(
        self,
        labels,
        *,
        stem,
        blocks,
        growth_rates,
        widths,
        kernel_size,
        dropout_rate,
        mixpool_learned,
        form,
    ):
        super().__init__(2 * widths[-1], labels, dropout_rate, spl=True)
        self.stem, self.blocks, width = ConvNorm(3, stem, 7, 4), len(blocks), stem
        for number, (count, growth_rate, features) in enumerate(
            zip(blocks, growth_rates, widths, strict=True)
        ):
            block = DenseBlock(width, count, growth_rate, features, kernel_size)
            if number:
                self.add_module(f"mixpool_{number}", MixPool(mixpool_learned))
            self.add_module(f"block_{number}", block)
            width = features

    def forward(self, images):
        """Images in [0, 1] -> (logits, scores before score propagation)."""
        x = F.mish(self.stem(self.input(images)))
        for number in range(self.blocks):
            if number:
                x = getattr(self, f"mixpool_{number}")(x)
            x = getattr(self, f"block_{number}")(x)
        return self.scores(torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))


class VGG16Trunk(Head):
    """The stages of VGG16-BN beside the head."""

    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self, *head, **options):
        super().__init__(*head, **options)
        self.names, width = [], 3
        for stage, (features, count) in enumerate(zip(self.WIDTHS, (2, 2, 3, 3, 3), strict=True)):
            self.names.append([f"stage{stage + 1}_{number}" for number in range(count)])
            for name in self.names[-1]:
                self.add_module(name, ConvNorm(width, features, 3))
                width = features

    def stages(self, images):
        """Images in [0, 1] -> the output of each stage, before it is pooled."""
        x, kept = self.input(images), []
        for stage in self.names:
            for name in stage:
                x = F.relu(getattr(self, name)(x))
            kept.append(x)
            x = F.max_pool2d(x, 2)
        return kept


class VGG16(VGG16Trunk):
    """`maknet_jax.models.VGG16`."""

    def __init__(self, labels, *, dropout_rate):
        super().__init__(512, labels, dropout_rate, spl=False)

    def forward(self, images):
        """Images in [0, 1] -> (logits, None)."""
        return self.scores(F.max_pool2d(self.stages(images)[-1], 2).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the input added, projected where the shape changes."""

    def __init__(self, width, features, stride):
        super().__init__()
        self.first = ConvNorm(width, features, 3, stride)
        self.second = ConvNorm(features, features, 3)
        same = stride == 1 and width == features
        self.shortcut = nn.Identity() if same else ConvNorm(width, features, 1, stride)

    def forward(self, x):
        """`[B, width, H, W]` -> `[B, features, H / stride, W / stride]`."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(Head):
    """`maknet_jax.models.ResNet18`."""

    def __init__(self, labels, *, dropout_rate):
        super().__init__(512, labels, dropout_rate, spl=True)
        self.stem, self.names, width = ConvNorm(3, 64, 7, 2), [], 64
        for stage, features in enumerate((64, 128, 256, 512)):
            for number in range(2):
                self.names.append(f"stage{stage + 1}_{number}")
                stride = 2 if stage and not number else 1
                self.add_module(self.names[-1], BasicBlock(width, features, stride))
                width = features

    def forward(self, images):
        """Images in [0, 1] -> (logits, scores before score propagation)."""
        x = F.max_pool2d(F.relu(self.stem(self.input(images))), 3, 2, 1)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.scores(x.mean((2, 3)))


NETWORKS = {"maknet": MAKNet, "vgg16": VGG16, "resnet18": ResNet18}
NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def from_flax(arrays):
    """Flax paths "block_0/norm_0/scale" -> torch names; kernels to OIHW and `[out, in]`."""
    weights = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        array = torch.from_numpy(array)
        if leaf == "kernel":
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T
        weights[".".join([*parents, NAMES.get(leaf, leaf)])] = array
    return weights


def focal_loss(logits, batch, gamma):
    """The mean weighted focal loss, as `maknet_jax.training.losses` has it."""
    labels = batch["labels"]
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = batch["pos_weight"] * labels * torch.exp(gamma * log_not_p) * log_p
    negative = batch["neg_weight"] * (1 - labels) * torch.exp(gamma * log_p) * log_not_p
    weight = batch["label_mask"] * batch["weight"][:, None]
    return -((positive + negative) * weight).sum() / weight.sum().clamp(min=1)


class Timed:
    """A network with its weights, batch, loss and optimiser."""

    def __init__(self, file, about):
        with np.load(file) as arrays:
            weights = {name[8:]: arrays[name] for name in arrays if name.startswith("weights/")}
            self.batch = {
                name[6:]: torch.from_numpy(arrays[name])
                for name in arrays
                if name.startswith("batch/")
            }
        self.about = about
        self.network = NETWORKS[about["model"]](self.batch["labels"].shape[1], **about["options"])
        self.network.load_state_dict(
            {name: value for name, value in self.network.state_dict().items() if "tracked" in name}
            | from_flax(weights)
        )
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.RAdam(self.network.parameters(), **about["optimizer"])

    def images(self):
        """int16 HU `[B, S, S, 3]` -> `[B, 3, S, S]` in [0, 1], channels_last."""
        low, high = self.about["window"]
        images = self.batch["image"].permute(0, 3, 1, 2).float()
        return ((images - low) * (1 / (high - low))).clamp(0, 1)

    def predict(self):
        """Logits `[B, K]`."""
        self.network.eval()
        with torch.inference_mode():
            return self.network(self.images())[0]

    def train(self):
        """One update; returns the loss."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        before_weight, after_weight = self.about["head_weights"]
        logits, before = self.network(self.images())
        loss = after_weight * focal_loss(logits, self.batch, self.about["gamma"])
        if before is not None:
            loss = loss + before_weight * focal_loss(before, self.batch, self.about["gamma"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main():
    """Obeys lines of JSON on standard input, answers each with one; sleeps in between."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answer = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(answer), flush=True)
    networks = {}
    for line in sys.stdin:
        ask = json.loads(line)
        if "load" in ask:
            networks[ask["name"]] = Timed(ask["load"], ask)
            answer = {}
        else:
            step = getattr(networks[ask["name"]], ask["step"])
            began = time.perf_counter()
            for _ in range(ask["calls"]):
                result = step()
            answer = {"seconds": time.perf_counter() - began, "result": result.tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
