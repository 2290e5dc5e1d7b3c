"""The components of MAKNet (paper, section 3 and figure 1), each a Flax Linen module.

Images are `[B, H, W, C]`. Activations have the module's `dtype`; parameters and BatchNorm
statistics are float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from maknet_jax.errors import InputError
from maknet_jax.models import convolution, pooling

he_normal = nn.initializers.he_normal()


class Outputs(NamedTuple):
    """What every network returns.

    Attributes:
      logits: float32 `[B, K]`; the prediction is their sigmoid.
      scores_before_spl: float32 `[B, K]`, the first head, or None without score propagation.
      features: `[B, F]`, pooled, before dropout and the classifier.
    """

    logits: jax.Array
    scores_before_spl: jax.Array | None
    features: jax.Array


def score_layer(features, **kwargs):
    """A float32 Dense for scores; accelerators would multiply in bfloat16 or TF32 if not told."""
    return nn.Dense(features, precision=jax.lax.Precision.HIGHEST, **kwargs)


@jax.custom_vjp
def mish(x):
    """Mish, x * tanh(softplus(x)) (Misra, arXiv:1908.08681).

    With n = e^x (e^x + 2), tanh(softplus(x)) = n / (n + 2): one exponential instead of three
    transcendental functions. Above 20 the quotient is 1 in float32. For the way back only x is
    kept, one array instead of several. `x` and the result: any shape, float32 or bfloat16 (float16
    overflows). Forward-mode differentiation raises a TypeError.
    """
    exp = jnp.exp(jnp.minimum(x, 20.0))
    n = exp * (exp + 2.0)
    return x * (n / (n + 2.0))


def _mish_backward(x, slope):
    """tanh(softplus(x)) + x * 4 q^2 (1 + q) / (1 + 2 q + 2 q^2)^2 with q = e^-x, times `slope`.

    By q and not by e^x, which XLA would take, and so keep, from the forward pass.
    """
    x = jnp.clip(x, -40.0, 40.0)  # beyond, the slope is 0 or 1 in float32
    q = jnp.exp(-x)
    whole = 1.0 + 2.0 * q * (1.0 + q)
    rise = 2.0 * q / whole
    return (slope * ((1.0 + 2.0 * q) / whole + x * rise * (2.0 * q * (1.0 + q) / whole)),)


mish.defvjp(lambda x: (mish(x), x), _mish_backward)


class InputNorm(nn.Module):
    """(images - mean) / std, with what the weights were trained on: 0 and 1 unless imported.

    The two lie among the `batch_stats`, so that they are saved and restored with the weights.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        """`[B, H, W, C]` -> the same shape in `dtype`."""
        shape = images.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        std = self.variable("batch_stats", "std", jnp.ones, shape)
        return ((images - mean.value) / std.value).astype(self.dtype)


class Kernel(nn.Module):
    """A convolution's kernel on its own, so that its layer can choose how to apply it."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self):
        """`shape`, HWIO: kept in float32, given in `dtype`."""
        return self.param("kernel", he_normal, self.shape).astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias (BatchNorm would cancel it) and BatchNorm."""

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = Kernel(shape, self.dtype, name="conv")()
        x = convolution.convolve(x.astype(self.dtype), kernel, self.strides)
        return batch_norm(self.dtype, train, name="norm")(x)


def batch_norm(dtype, train, **kwargs):
    """BatchNorm with torch's defaults: momentum 0.1 (Flax counts 0.9), epsilon 1e-5.

    The variance that it keeps is the batch's own; torch keeps n / (n - 1) of it.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **kwargs
    )


FORMS = ("split", "matmul", "fused", "wide", "wide_fused")


def choose_form(form):
    """The form itself, or for "auto" the fastest here (measured by `benchmarks/speed/makconv.py`).

    Here is where this process computes: to compile ahead for another platform, name the form.

    Raises:
      InputError: there is no such form.
    """
    if form == "auto":
        return "matmul" if jax.default_backend() == "cpu" else "fused"
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown: choose auto or one of {', '.join(FORMS)}")
    return form


class MAKConv(nn.Module):
    """Mixed asymmetric kernels: k x k, 1 x k, k x 1 and 1 x 1 over all input channels each.

    Every kernel gives a quarter of the `features`; the first ones take the remainder of a count
    that four does not divide. No bias: BatchNorm follows.

    The same parameters in forms that are equal in value and gradient. "split" are four
    convolutions: the fewest FLOPs, but the input is read four times. "matmul" is one matrix product
    whose columns are shifted and added: no FLOP more, one reading, but (k + 1)^2 / 4 times the
    output in between (without strides only; with them it is "split"). "fused" is one k x k
    convolution whose kernel holds zeros where the asymmetric ones end: 2.25 times the FLOPs at
    k = 3, one reading and nothing in between. The wide forms differ in a dense block only, see
    `DenseBlock`.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    form: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def kernels(self, channels):
        """The kernels for `channels` inputs, HWIO; those without an output are left out."""
        k = self.kernel_size
        if k % 2 == 0:
            raise InputError(f"kernel_size {k} is even: MAKConv needs an odd one to keep its place")
        sizes = {"kxk": (k, k), "1xk": (1, k), "kx1": (k, 1), "1x1": (1, 1)}
        kernels = []
        for number, (name, size) in enumerate(sizes.items()):
            features = (self.features + 3 - number) // 4
            if features:
                shape = (*size, channels, features)
                kernels.append(Kernel(shape, self.dtype, name=f"conv_{name}")())
        return kernels

    def __call__(self, x):
        """`[B, H, W, C]` -> `[B, ceil(H / strides), ceil(W / strides), features]`."""
        form = choose_form(self.form)
        kernels, x = self.kernels(x.shape[-1]), x.astype(self.dtype)
        if form == "matmul" and self.strides == 1:
            return convolution.convolve_by_matmul(x, kernels)
        if form.endswith("fused"):
            kernels = [convolution.fuse(kernels, self.kernel_size)]
        outputs = [convolution.convolve(x, kernel, self.strides) for kernel in kernels]
        return jnp.concatenate(outputs, axis=-1)


class MixPool(nn.Module):
    """a * max pool + (1 - a) * average pool, 2 x 2 with stride 2; `a` is learned from 0.5."""

    learned: bool = True

    @nn.compact
    def __call__(self, x):
        """`[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
        share = self.param("share", nn.initializers.constant(0.5), ()) if self.learned else 0.5
        return pooling.mix_pool(x, jnp.asarray(share, jnp.float32))


def global_concat_pool(x):
    """GCP: `[B, H, W, C]` -> float32 `[B, 2C]`, maxima then means."""
    means = x.mean(axis=(1, 2), dtype=jnp.float32)
    return jnp.concatenate([x.max(axis=(1, 2)).astype(jnp.float32), means], axis=-1)


class CBAM(nn.Module):
    """Convolutional block attention: over channels, then over places (Woo, arXiv:1807.06521)."""

    ratio: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        """`[B, H, W, C]` -> the same shape."""
        channels = x.shape[-1]
        hidden = nn.Dense(max(1, channels // self.ratio), dtype=self.dtype, name="mlp_hidden")
        output = nn.Dense(channels, dtype=self.dtype, name="mlp_output")
        pooled = jnp.stack([x.mean(axis=(1, 2)), x.max(axis=(1, 2))])
        attention = output(nn.relu(hidden(pooled))).sum(axis=0)
        x = x * nn.sigmoid(attention)[:, None, None]
        places = jnp.stack([x.max(axis=-1), x.mean(axis=-1)], axis=-1)
        places = nn.Conv(1, (7, 7), padding=3, use_bias=False, dtype=self.dtype, name="places")(
            places
        )
        return x * nn.sigmoid(batch_norm(self.dtype, train, name="places_norm")(places))


class ScorePropagation(nn.Module):
    """SPL: a dense layer over the scores that starts as the identity (LesaNet, section 3.3)."""

    @nn.compact
    def __call__(self, scores):
        """float32 `[B, K]` -> `[B, K]`: labels that imply each other learn to raise each other."""

        def identity(key, shape, dtype=jnp.float32):
            return jnp.eye(shape[0], dtype=dtype)

        return score_layer(scores.shape[-1], kernel_init=identity, name="dense")(scores)


class DenseBlock(nn.Module):
    """Densely connected MAKConv layers, then a standard 1 x 1 convolution and CBAM (figure 1).

    In the forms "split", "matmul" and "fused" every layer convolves all features before it. In
    "wide" and "wide_fused" every new feature is convolved once, for all layers that will read it,
    and added to what they have: the same sums, from fewer and larger convolutions.
    """

    layers: int
    growth_rate: int
    features: int
    kernel_size: int = 3
    form: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        """`[B, H, W, C]` -> `[B, H, W, features]`."""
        form = choose_form(self.form)
        layers = [
            MAKConv(self.growth_rate, self.kernel_size, form=form, dtype=self.dtype, name=name)
            for name in (f"makconv_{number}" for number in range(self.layers))
        ]
        features, sums = [x.astype(self.dtype)], []
        if form.startswith("wide"):
            channels = [x.shape[-1] + number * self.growth_rate for number in range(self.layers)]
            kernels = [makconv.kernels(c) for makconv, c in zip(layers, channels, strict=True)]
            if form == "wide_fused":
                kernels = [[convolution.fuse(each, self.kernel_size)] for each in kernels]
            sums = [0] * self.layers
        for number, makconv in enumerate(layers):
            if sums:
                first = channels[number] - features[-1].shape[-1]
                readers = [
                    [k[:, :, first : channels[number]] for k in each] for each in kernels[number:]
                ]
                for reader, read in enumerate(_convolve_once(features[-1], readers), number):
                    sums[reader] += read
                new = sums[number]
            else:
                new = makconv(jnp.concatenate(features, axis=-1))
            new = mish(batch_norm(self.dtype, train, name=f"norm_{number}")(new))
            features.append(new)
        x = jnp.concatenate(features, axis=-1)
        x = ConvNorm(self.features, (1, 1), dtype=self.dtype, name="transition")(x, train)
        x = mish(x)
        return CBAM(dtype=self.dtype, name="cbam")(x, train)


def _convolve_once(x, readers):
    """Yields what each reader, a list of kernels, makes of x: one convolution a kernel shape."""
    shapes = (jnp.concatenate(same, axis=-1) for same in zip(*readers, strict=True))
    by_shape = [convolution.convolve(x, kernel) for kernel in shapes]
    for number in range(len(readers)):
        parts = [jnp.split(made, len(readers), axis=-1)[number] for made in by_shape]
        yield jnp.concatenate(parts, axis=-1)
