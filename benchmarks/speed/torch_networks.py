"""The networks in PyTorch, and the process that against_pytorch.py starts to time them.

Needs torch and NumPy only. Modules are named as in Flax, so that weights map by name. Images are
`[B, C, H, W]` in channels_last.

The process reads one JSON request per line from standard input and answers each with one line:
`{"name", "load": FILE, "model", "options", ...}` loads a network, `{"name", "step", "calls"}` runs
one of its methods and answers `{"seconds", "result"}`. The first line that it writes states the
version and the number of threads of torch.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class InputNorm(nn.Module):
    """(images - mean) / std."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of `x`."""
        return (x - self.running_mean[:, None, None]) / self.std[:, None, None]


class ConvNorm(nn.Module):
    """A convolution without bias and BatchNorm."""

    def __init__(self, width: int, features: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(width, features, kernel_size, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, width, H, W]` -> `[B, features, H / stride, W / stride]`."""
        return self.norm(self.conv(x))


class MAKConv(nn.Module):
    """Four convolutions, k x k, 1 x k, k x 1 and 1 x 1, each with a quarter of the features."""

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        sizes = {"kxk": (k, k), "1xk": (1, k), "kx1": (k, 1), "1x1": (1, 1)}
        for number, (name, size) in enumerate(sizes.items()):
            if share := (features + 3 - number) // 4:
                padding = (size[0] // 2, size[1] // 2)
                conv = nn.Conv2d(width, share, size, padding=padding, bias=False)
                self.add_module(f"conv_{name}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, width, H, W]` -> `[B, features, H, W]`."""
        return torch.cat([conv(x) for conv in self.children()], 1)


class MixPool(nn.Module):
    """share * max pool + (1 - share) * average pool."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        share = torch.tensor(0.5)
        self.share = nn.Parameter(share) if learned else 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> `[B, C, H // 2, W // 2]`."""
        return self.share * F.max_pool2d(x, 2) + (1 - self.share) * F.avg_pool2d(x, 2)


class CBAM(nn.Module):
    """Channel attention, then spatial attention."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // ratio)
        self.mlp_hidden = nn.Linear(channels, hidden)
        self.mlp_output = nn.Linear(hidden, channels)
        self.places = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.places_norm = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of `x`."""
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))])
        attention = self.mlp_output(F.relu(self.mlp_hidden(pooled))).sum(0)
        x = x * torch.sigmoid(attention)[:, :, None, None]
        places = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.places_norm(self.places(places)))


class DenseBlock(nn.Module):
    """Densely connected MAKConvs, a 1 x 1 convolution and CBAM."""

    def __init__(self, width: int, layers: int, growth_rate: int, features: int, k: int) -> None:
        super().__init__()
        self.layers = layers
        for number in range(layers):
            self.add_module(f"makconv_{number}", MAKConv(width, growth_rate, k))
            self.add_module(f"norm_{number}", nn.BatchNorm2d(growth_rate))
            width += growth_rate
        self.transition = ConvNorm(width, features, 1)
        self.cbam = CBAM(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, width, H, W]` -> `[B, features, H, W]`."""
        for number in range(self.layers):
            new = getattr(self, f"makconv_{number}")(x)
            x = torch.cat([x, F.mish(getattr(self, f"norm_{number}")(new))], 1)
        return self.cbam(F.mish(self.transition(x)))


class Head(nn.Module):
    """Base of the networks: input normalization, classifier and optional score propagation."""

    def __init__(self, width: int, labels: int, dropout_rate: float, spl: bool) -> None:
        super().__init__()
        self.input = InputNorm()
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(width, labels)
        self.spl = nn.ModuleDict({"dense": nn.Linear(labels, labels)}) if spl else None

    def scores(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, width]` -> (logits, scores before score propagation or None), `[B, labels]`."""
        scores = self.classifier(self.dropout(features))
        return (scores, None) if self.spl is None else (self.spl["dense"](scores), scores)


class MAKNet(Head):
    """`maknet_jax.models.MAKNet`; `form`, an implementation in XLA, is ignored."""

    def __init__(
        self,
        labels: int,
        *,
        stem: int,
        blocks: Sequence[int],
        growth_rates: Sequence[int],
        widths: Sequence[int],
        kernel_size: int,
        dropout_rate: float,
        mixpool_learned: bool,
        form: str,
    ) -> None:
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

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images in [0, 1] -> (logits, scores before score propagation)."""
        x = F.mish(self.stem(self.input(images)))
        for number in range(self.blocks):
            if number:
                x = getattr(self, f"mixpool_{number}")(x)
            x = getattr(self, f"block_{number}")(x)
        return self.scores(torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))


class VGG16Trunk(Head):
    """The stages of VGG16-BN and the head."""

    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self, *head: Any, **options: Any) -> None:
        super().__init__(*head, **options)
        self.names, width = [], 3
        for stage, (features, count) in enumerate(zip(self.WIDTHS, (2, 2, 3, 3, 3), strict=True)):
            self.names.append([f"stage{stage + 1}_{number}" for number in range(count)])
            for name in self.names[-1]:
                self.add_module(name, ConvNorm(width, features, 3))
                width = features

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images in [0, 1] -> the output of each stage before pooling."""
        x, outputs = self.input(images), []
        for stage in self.names:
            for name in stage:
                x = F.relu(getattr(self, name)(x))
            outputs.append(x)
            x = F.max_pool2d(x, 2)
        return outputs


class VGG16(VGG16Trunk):
    """`maknet_jax.models.VGG16`."""

    def __init__(self, labels: int, *, dropout_rate: float) -> None:
        super().__init__(512, labels, dropout_rate, spl=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images in [0, 1] -> (logits, None)."""
        return self.scores(F.max_pool2d(self.stages(images)[-1], 2).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions plus the input, which is projected if the shape changes."""

    def __init__(self, width: int, features: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(width, features, 3, stride)
        self.second = ConvNorm(features, features, 3)
        same = stride == 1 and width == features
        self.shortcut = nn.Identity() if same else ConvNorm(width, features, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, width, H, W]` -> `[B, features, H / stride, W / stride]`."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(Head):
    """`maknet_jax.models.ResNet18`."""

    def __init__(self, labels: int, *, dropout_rate: float) -> None:
        super().__init__(512, labels, dropout_rate, spl=True)
        self.stem, self.names, width = ConvNorm(3, 64, 7, 2), [], 64
        for stage, features in enumerate((64, 128, 256, 512)):
            for number in range(2):
                self.names.append(f"stage{stage + 1}_{number}")
                stride = 2 if stage and not number else 1
                self.add_module(self.names[-1], BasicBlock(width, features, stride))
                width = features

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images in [0, 1] -> (logits, scores before score propagation)."""
        x = F.max_pool2d(F.relu(self.stem(self.input(images))), 3, 2, 1)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.scores(x.mean((2, 3)))


NETWORKS = {"maknet": MAKNet, "vgg16": VGG16, "resnet18": ResNet18}
NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Converts weights from Flax.

    Args:
      arrays: by path, as "block_0/norm_0/scale".

    Returns:
      A state dict: kernels become `[O, I, H, W]` and `[out, in]`.
    """
    weights = {}
    for path, array in arrays.items():
        *parents, leaf = path.split("/")
        array = torch.from_numpy(array)
        if leaf == "kernel":
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T
        weights[".".join([*parents, NAMES.get(leaf, leaf)])] = array
    return weights


def focal_loss(
    logits: torch.Tensor, batch: Mapping[str, torch.Tensor], gamma: float
) -> torch.Tensor:
    """The mean weighted focal loss of `maknet_jax.training.losses`, a scalar; logits `[B, K]`."""
    labels = batch["labels"]
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = batch["pos_weight"] * labels * torch.exp(gamma * log_not_p) * log_p
    negative = batch["neg_weight"] * (1 - labels) * torch.exp(gamma * log_p) * log_not_p
    weight = batch["label_mask"] * batch["weight"][:, None]
    return -((positive + negative) * weight).sum() / weight.sum().clamp(min=1)


class Timed:
    """A network with its weights, batch, loss and optimizer; its methods are the timed steps."""

    def __init__(self, file: str, settings: Mapping[str, Any]) -> None:
        """Loads a network.

        Args:
          file: an .npz with weights/PATH and batch/NAME.
          settings: the request that loads it: model, options, window, optimizer and, by script,
            more.
        """
        with np.load(file) as arrays:
            weights = {name[8:]: arrays[name] for name in arrays if name.startswith("weights/")}
            self.batch = {
                name[6:]: torch.from_numpy(arrays[name])
                for name in arrays
                if name.startswith("batch/")
            }
        self.settings = settings
        self.network = NETWORKS[settings["model"]](
            self.batch["labels"].shape[1], **settings["options"]
        )
        self.network.load_state_dict(
            {name: value for name, value in self.network.state_dict().items() if "tracked" in name}
            | from_flax(weights)
        )
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.RAdam(self.network.parameters(), **settings["optimizer"])

    def images(self) -> torch.Tensor:
        """int16 HU `[B, S, S, 3]` -> `[B, 3, S, S]` in [0, 1], channels_last."""
        low, high = self.settings["window"]
        images = self.batch["image"].permute(0, 3, 1, 2).float()
        return ((images - low) * (1 / (high - low))).clamp(0, 1)

    def predict(self) -> torch.Tensor:
        """Logits `[B, K]`."""
        self.network.eval()
        with torch.inference_mode():
            return self.network(self.images())[0]

    def train(self) -> torch.Tensor:
        """Runs one training step and returns the loss."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        weight_before, weight_after = self.settings["head_weights"]
        logits, before = self.network(self.images())
        loss = weight_after * focal_loss(logits, self.batch, self.settings["gamma"])
        if before is not None:
            loss = loss + weight_before * focal_loss(before, self.batch, self.settings["gamma"])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main(timed: type[Timed] = Timed) -> None:
    """Answers requests until standard input ends; see the module's docstring."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answer = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(answer), flush=True)
    networks: dict[str, Timed] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            networks[request["name"]] = timed(request["load"], request)
            answer = {}
        else:
            step = getattr(networks[request["name"]], request["step"])
            start = time.perf_counter()
            for _ in range(request["calls"]):
                result = step()
            answer = {"seconds": time.perf_counter() - start, "result": result.tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
