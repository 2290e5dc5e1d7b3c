"""The Python example of docs/attribution.md runs."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "attribution.md"


class Pooled(nn.Module):
    """A network of the user."""

    @nn.compact
    def __call__(self, images):
        """`[B, H, W, C]` -> `[B, 4]`."""
        return nn.Dense(4)(nn.tanh(nn.Conv(8, (3, 3))(images)).mean(axis=(1, 2)))


def test_attributions_of_any_flax_model(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    model, images = Pooled(), np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    variables = model.init(jax.random.key(0), images)
    names = {"model": model, "variables": variables, "images": images, "targets": [[1, 3], [0, 2]]}
    exec(code, names)
    result = names["result"]
    assert result.maps.shape == (2, 2, 16, 16, 3) and not result.flagged.any()
    logits = np.asarray(model.apply(variables, images))
    change = 1 / (1 + np.exp(-logits)) - 1 / (
        1 + np.exp(-np.asarray(model.apply(variables, 0 * images)))
    )
    expected = np.take_along_axis(change, np.array(names["targets"]), axis=1)
    np.testing.assert_allclose(result.maps.sum((2, 3, 4)), expected, atol=1e-5)
    assert capsys.readouterr().out.startswith("(2, 2, 16, 16, 3) ")
    assert result.relative.max() == pytest.approx(0, abs=0.01)
