"""The Python example of docs/attribution.md runs; `test_api` runs those of `load`."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import linen as nn

from maknet_jax import models

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "attribution.md"


class Pooled(nn.Module):
    """A network of the user."""

    @nn.compact
    def __call__(self, images):
        """`[B, H, W, C]` -> `[B, 4]`."""
        return nn.Dense(4)(nn.tanh(nn.Conv(8, (3, 3))(images)).mean(axis=(1, 2)))


class Scored(Pooled):
    """The same, called with `train` and returning logits among other things, as ours do."""

    @nn.compact
    def __call__(self, images, train):
        """`[B, H, W, C]` -> `Outputs`."""
        assert train is False
        return models.Outputs(Pooled(name="pooled")(images), None, images)


OURS = {"stem": 8, "blocks": (1, 1), "growth_rates": (8, 8), "widths": (8, 8)}


@pytest.mark.parametrize("kind", ["foreign", "foreign with options", "ours"])
def test_attributions_of_any_flax_model(capsys, kind):
    *_, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    if kind == "foreign":
        model = Pooled()
        variables = model.init(jax.random.key(0), images)
        scores = model.apply
    else:
        model = Scored() if kind == "foreign with options" else models.build("maknet", 4, **OURS)
        variables = model.init(jax.random.key(0), images, train=False)

        def scores(variables, images):
            return model.apply(variables, images, train=False).logits

    names = {"model": model, "variables": variables, "images": images, "targets": [[1, 3], [0, 2]]}
    exec(code, names)
    result = names["result"]
    assert result.maps.shape == (2, 2, 16, 16, 3) and not result.flagged.any()
    logits, black = (np.asarray(scores(variables, image)) for image in (images, 0 * images))
    change = 1 / (1 + np.exp(-logits)) - 1 / (1 + np.exp(-black))
    expected = np.take_along_axis(change, np.array(names["targets"]), axis=1)
    np.testing.assert_allclose(result.maps.sum((2, 3, 4)), expected, atol=1e-4)
    assert capsys.readouterr().out.startswith("(2, 2, 16, 16, 3) ")
    assert result.relative.max() == pytest.approx(0, abs=0.01)
