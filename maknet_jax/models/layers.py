"""The components of MAKNet (paper, section 3 and figure 1), each a Flax Linen module.

Images are `[B, H, W, C]`. Activations have the module's `dtype`; parameters and BatchNorm
statistics are float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from maknet_jax.errors import InputError
from maknet_jax.models import convolution, pooling

he_normal = nn.initializers.he_normal()


def score_layer(features: int, **kwargs: Any) -> nn.Dense:
    """A Dense layer with full float32 products; accelerators default to bfloat16 or TF32."""
    return nn.Dense(features, precision=jax.lax.Precision.HIGHEST, **kwargs)


@jax.custom_vjp
def mish(x: jax.Array) -> jax.Array:
    """Mish, x * tanh(softplus(x)) (Misra, arXiv:1908.08681).

    With n = e^x (e^x + 2), tanh(softplus(x)) = n / (n + 2): one exponential instead of three
    transcendental functions. Above 20 the quotient is 1 in float32. Only x is saved for the
    backward pass, one array instead of several. Forward-mode differentiation raises a TypeError.

    Args:
      x: any shape, float32 or bfloat16 (float16 overflows).

    Returns:
      The same shape and dtype.
    """
    exp = jnp.exp(jnp.minimum(x, 20.0))
    n = exp * (exp + 2.0)
    return x * (n / (n + 2.0))


def _mish_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    """`cotangent` * (tanh(softplus(x)) + x * 4 q^2 (1 + q) / (1 + 2 q + 2 q^2)^2), q = e^-x.

    Written in terms of q because XLA would otherwise reuse e^x of the forward pass and store it.
    """
    x = jnp.clip(x, -40.0, 40.0)  # beyond, the derivative is 0 or 1 in float32
    q = jnp.exp(-x)
    denominator = 1.0 + 2.0 * q * (1.0 + q)
    tail = 2.0 * q / denominator
    derivative = (1.0 + 2.0 * q) / denominator + x * tail * (2.0 * q * (1.0 + q) / denominator)
    return (cotangent * derivative,)


mish.defvjp(lambda x: (mish(x), x), _mish_backward)


class InputNorm(nn.Module):
    """(images - mean) / std per channel; mean 0 and std 1 unless the weights were imported.

    Both are `batch_stats`, so that they are saved and restored with the weights.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same shape in `dtype`."""
        shape = images.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        std = self.variable("batch_stats", "std", jnp.ones, shape)
        return ((images - mean.value) / std.value).astype(self.dtype)


class Kernel(nn.Module):
    """The kernel of a convolution without the operation, which its layer chooses."""

    shape: tuple[int, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        """`shape`, HWIO: a float32 parameter, returned in `dtype`."""
        return self.param("kernel", he_normal, self.shape).astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias (BatchNorm would cancel it) and BatchNorm."""

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = Kernel(shape, self.dtype, name="conv")()
        x = convolution.convolve(x.astype(self.dtype), kernel, self.strides)
        return batch_norm(self.dtype, train, name="norm")(x)


def batch_norm(dtype: DTypeLike, train: bool, **kwargs: Any) -> nn.BatchNorm:
    """BatchNorm with torch's defaults: momentum 0.1 (0.9 as Flax counts it), epsilon 1e-5.

    They are our choice. The running variance averages biased batch variances; torch averages
    unbiased ones, which are n / (n - 1) times as large.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **kwargs
    )


FORMS = ("split", "matmul", "fused")
KERNELS = ("conv_kxk", "conv_1xk", "conv_kx1", "conv_1x1")  # of MAKConv
JOINED = "joined"  # see `join_kernels`


def choose_form(form: str) -> str:
    """The form itself, or for "auto" the fastest one.

    On CPU as measured by `benchmarks/speed/makconv.py`; on TPUs and GPUs by the traffic of the
    compiled program, see `benchmarks/speed/aot.py`.

    "auto" refers to the default backend of this process: to compile ahead of time for another
    platform, pass the form.

    Raises:
      InputError: an unknown form.
    """
    if form == "auto":
        return "matmul" if jax.default_backend() == "cpu" else "fused"
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown: choose auto or one of {', '.join(FORMS)}")
    return form


class MAKConv(nn.Module):
    """Mixed asymmetric kernels: k x k, 1 x k, k x 1 and 1 x 1, each over all input channels.

    Every kernel has a quarter of the output `features`; if four does not divide their number, the
    first kernels get the remainder (our choice). No bias: BatchNorm follows.

    The form decides how the layer is computed; parameters, values and gradients are the same:
      split: four convolutions, the reference. The fewest FLOPs, but the input is read four times.
      matmul: one matrix product whose columns are shifted and added. The FLOPs of "split" and one
        read of the input, but the intermediate array is (k + 1)^2 / 4 times as large as the output.
        With strides it is the same as "split".
      fused: one k x k convolution with zeros around the smaller kernels. 2.25 times the FLOPs at
        k = 3, one read of the input, no intermediate array.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    form: str = "auto"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`.

        Raises:
          InputError: an unknown form or an even `kernel_size`.
        """
        form, k, x = choose_form(self.form), self.kernel_size, x.astype(self.dtype)
        if k % 2 == 0:
            raise InputError(f"kernel_size {k} is even: MAKConv needs an odd one, which is centred")
        edges = zip(KERNELS, ((k, k), (1, k), (k, 1), (1, 1)), strict=True)
        parts = [
            (name, size, (self.features + 3 - number) // 4)
            for number, (name, size) in enumerate(edges)
        ]
        parts = [part for part in parts if part[2]]
        if self.has_variable("params", JOINED):
            _, sizes, counts = zip(*parts, strict=True)
            width = sum(rows * columns * count for _, (rows, columns), count in parts)
            joined = self.param(JOINED, he_normal, (x.shape[-1], width)).astype(self.dtype)
            return convolution.convolve_joined(x, joined, sizes, counts)
        kernels = [
            Kernel((*size, x.shape[-1], count), self.dtype, name=name)()
            for name, size, count in parts
        ]
        if form == "matmul" and self.strides == 1:
            return convolution.convolve_by_matmul(x, kernels)
        if form == "fused":
            kernels = [convolution.fuse(kernels, k)]
        outputs = [convolution.convolve(x, kernel, self.strides) for kernel in kernels]
        return jnp.concatenate(outputs, axis=-1)


def join_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Weights for prediction in the form "matmul": each MAKConv's kernels as one matrix.

    Otherwise every prediction would concatenate them again. Values do not change.

    Args:
      params: nested, of a network whose MAKConv layers have no strides.

    Returns:
      The same tree, in which a NumPy array, `JOINED`, replaces the kernels.
    """
    if not isinstance(params.get(KERNELS[0]), Mapping):
        return {
            name: join_kernels(part) if isinstance(part, Mapping) else part
            for name, part in params.items()
        }
    kernels = [np.asarray(params[name]["kernel"]) for name in KERNELS if name in params]
    return {JOINED: np.concatenate(convolution.taps(kernels), axis=-1)}


class MixPool(nn.Module):
    """a * max pool + (1 - a) * average pool, 2 x 2 with stride 2.

    The paper only says that it combines the two. Our choice: one scalar `a` per layer, initially
    0.5 and learned, or fixed at 0.5 if `learned` is False.
    """

    learned: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
        share = self.param("share", nn.initializers.constant(0.5), ()) if self.learned else 0.5
        return pooling.mix_pool(x, jnp.asarray(share, jnp.float32))


def global_concat_pool(x: jax.Array) -> jax.Array:
    """Global concatenate pooling: `[B, H, W, C]` -> float32 `[B, 2C]`, maxima then means."""
    means = x.mean(axis=(1, 2), dtype=jnp.float32)
    return jnp.concatenate([pooling.maximum(x, (1, 2)).astype(jnp.float32), means], axis=-1)


class CBAM(nn.Module):
    """Convolutional block attention: over channels, then over positions (Woo, arXiv:1807.06521).

    The ratio of 16 and the 7 x 7 kernel are those of Woo et al. Our choices: the BatchNorm of the
    spatial attention has the same momentum as all others, 0.1 in torch's convention, instead of
    0.01 in the published code; and there is at least one hidden channel.
    """

    ratio: int = 16
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> the same shape."""
        channels = x.shape[-1]
        hidden = nn.Dense(max(1, channels // self.ratio), dtype=self.dtype, name="mlp_hidden")
        output = nn.Dense(channels, dtype=self.dtype, name="mlp_output")
        pooled = jnp.stack([x.mean(axis=(1, 2)), pooling.maximum(x, (1, 2))])
        attention = output(nn.relu(hidden(pooled))).sum(axis=0)
        x = x * nn.sigmoid(attention)[:, None, None]
        pooled = jnp.stack([pooling.maximum(x, (-1,)), x.mean(axis=-1)], axis=-1)
        conv = nn.Conv(1, (7, 7), padding=3, use_bias=False, dtype=self.dtype, name="places")
        attention = batch_norm(self.dtype, train, name="places_norm")(conv(pooled))
        return x * nn.sigmoid(attention)


class ScorePropagation(nn.Module):
    """SPL: a dense layer over the scores, initialised as the identity (LesaNet, section 3.3).

    It learns to raise the scores of labels that other labels imply.
    """

    @nn.compact
    def __call__(self, scores: jax.Array) -> jax.Array:
        """float32 `[B, K]` -> `[B, K]`."""

        def identity(
            key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
        ) -> jax.Array:
            return jnp.eye(shape[0], dtype=dtype)

        return score_layer(scores.shape[-1], kernel_init=identity, name="dense")(scores)


class DenseBlock(nn.Module):
    """Densely connected MAKConv layers, then a standard 1 x 1 convolution and CBAM (figure 1).

    Every MAKConv reads the block's input and the outputs of all layers before it. The kernel of
    the standard convolution, 1 x 1, is our choice. Without `mixed` the layers are plain k x k
    convolutions; without `attention` there is no CBAM.
    """

    layers: int
    growth_rate: int
    features: int
    kernel_size: int = 3
    form: str = "auto"
    mixed: bool = True
    attention: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, features]`."""
        outputs = [x.astype(self.dtype)]
        for number in range(self.layers):
            x = jnp.concatenate(outputs, axis=-1)
            if self.mixed:
                conv = MAKConv(
                    self.growth_rate,
                    self.kernel_size,
                    form=self.form,
                    dtype=self.dtype,
                    name=f"makconv_{number}",
                )
                new = conv(x)
            else:
                shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.growth_rate)
                kernel = Kernel(shape, self.dtype, name=f"conv_{number}")()
                new = convolution.convolve(x, kernel)
            new = batch_norm(self.dtype, train, name=f"norm_{number}")(new)
            outputs.append(mish(new))
        x = jnp.concatenate(outputs, axis=-1)
        x = ConvNorm(self.features, (1, 1), dtype=self.dtype, name="transition")(x, train)
        x = mish(x)
        return CBAM(dtype=self.dtype, name="cbam")(x, train) if self.attention else x
