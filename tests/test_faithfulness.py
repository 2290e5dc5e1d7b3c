"""Deletion, insertion and intervals, on a known model."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from maknet_jax import console
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.errors import InputError

SHARES = np.linspace(0, 1, 17)


def corner(images):
    """Label 0 is the mean of the upper left quarter, label 1 ignores the image."""
    value = images[:, :4, :4].mean(axis=(1, 2, 3))
    return jnp.stack([8 * value - 4, 0 * value], axis=1)


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0.8, 1, (3, 8, 8, 3)).astype(np.float32)


def test_ranks_are_a_permutation_by_descending_attribution():
    values = np.array([[[0.1, 3.0], [-2.0, 3.0]]])
    assert faithfulness.ranks(values).tolist() == [[[2, 0], [3, 1]]]  # ties in reading order
    random = faithfulness.random_ranks(np.ones((2, 4, 4), bool), 0)
    assert all(sorted(one.ravel()) == list(range(16)) for one in random)
    assert (random[0] != random[1]).any()


def test_random_order_starts_with_pixels_that_differ_from_the_baseline():
    differs = np.random.default_rng(1).random((3, 8, 8)) < 0.3
    order = faithfulness.random_ranks(differs, 0)
    for ranks, theirs in zip(order, differs, strict=True):
        assert sorted(ranks.ravel()) == list(range(64))
        assert sorted(ranks[theirs]) == list(range(theirs.sum()))
        assert (ranks[theirs] != np.arange(theirs.sum())).any()  # in random order


def test_curves_of_a_known_model(images):
    maps = ig.integrated_gradients(corner, images, np.array([[0]] * 3), 0.0).maps[:, 0].sum(-1)
    deletion, insertion = faithfulness.curves(
        corner, images, [0, 0, 0], np.zeros_like(images), faithfulness.ranks(maps), SHARES
    )
    whole = 1 / (1 + np.exp(-np.asarray(corner(images))[:, 0]))
    black = 1 / (1 + np.exp(4.0))
    np.testing.assert_allclose(deletion[:, 0], whole, rtol=1e-5)
    np.testing.assert_allclose(deletion[:, -1], black, rtol=1e-5)
    np.testing.assert_allclose(insertion[:, 0], black, rtol=1e-5)
    np.testing.assert_allclose(insertion[:, -1], whole, rtol=1e-5)
    # The model sees only a quarter of the pixels: nothing changes beyond it.
    np.testing.assert_allclose(deletion[:, 4:], black, rtol=1e-5)
    np.testing.assert_allclose(insertion[:, 4:], np.tile(whole[:, None], 13), rtol=1e-5)
    assert (np.diff(deletion[:, :5]) < 0).all() and (np.diff(insertion[:, :5]) > 0).all()


def test_a_good_map_beats_random_pixels(images):
    maps = ig.integrated_gradients(corner, images, np.array([[0]] * 3), 0.0).maps[:, 0].sum(-1)
    areas = []
    for order in (faithfulness.ranks(maps), faithfulness.random_ranks(maps != 9, 0)):
        both = faithfulness.curves(corner, images, [0] * 3, np.zeros_like(images), order, SHARES)
        areas.append([faithfulness.area(curve, SHARES) for curve in both])
    (deletion, insertion), (random_deletion, random_insertion) = areas
    assert (deletion < random_deletion - 0.1).all()
    assert (insertion > random_insertion + 0.1).all()
    flat, _ = faithfulness.curves(
        corner, images, [1] * 3, np.zeros_like(images), faithfulness.ranks(maps), SHARES
    )
    np.testing.assert_allclose(faithfulness.area(flat, SHARES), 0.5, rtol=1e-6)


def test_mass_inside_a_region():
    attribution = np.array([[3.0, 1.0], [-5.0, 0.0]])
    assert faithfulness.mass_inside(attribution, attribution == 3) == pytest.approx(0.75)
    assert np.isnan(faithfulness.mass_inside(-np.abs(attribution), attribution == 3))


def test_the_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        mean, low, high = faithfulness.bootstrap(rng.normal(2, 1, 40), seed=seed, draws=400)
        assert low < mean < high
        hits += low < 2 < high
    assert 175 <= hits <= 199  # 95 % of 200 is 190
    assert faithfulness.bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3, 0.3))


def test_whole_groups_are_resampled():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    alone = faithfulness.bootstrap(values)
    names = [f"patient {k}" for k in range(12)]
    mean, low, high = faithfulness.bootstrap(values, sorted(names))  # every value is its own group
    assert mean == pytest.approx(alone[0]) and high - low == pytest.approx(alone[2] - alone[1], 0.1)
    # Slices of one patient are not independent: ten copies give no narrower interval.
    copies = faithfulness.bootstrap(np.tile(values, 10), names * 10)
    ordered = faithfulness.bootstrap(values[np.argsort(names)])
    assert copies == pytest.approx(ordered)
    narrow = faithfulness.bootstrap(np.tile(values, 10))
    assert narrow[2] - narrow[1] < (copies[2] - copies[1]) / 2
    # The mean is over images, whatever the sizes of the groups.
    assert faithfulness.bootstrap([0, 0, 0, 1], ["a", "a", "a", "b"])[0] == 0.25


def test_invalid_arguments_are_refused(images):
    order = faithfulness.random_ranks(np.ones((3, 8, 8), bool), 0)
    for shares in ([0, 0.5], [0.1, 1], [0, 0.5, 0.5, 1]):
        with pytest.raises(InputError, match=re.escape(str([float(share) for share in shares]))):
            faithfulness.curves(corner, images, [0] * 3, images, order, shares)
    for values in ([], [np.nan]):
        with pytest.raises(InputError, match="values"):
            faithfulness.bootstrap(values)
    for share in (0, 1.5):
        with pytest.raises(InputError, match=f"share {share}"):
            perturbation.most_influential(np.ones((2, 2)), share)


def test_a_single_group_has_no_interval():
    assert (
        console.format_interval(faithfulness.bootstrap([0.25, 0.75], groups=["a", "a"])) == "0.500"
    )
    assert console.format_interval((0.5, 0.25, 0.75), 2) == "0.50 (0.25 to 0.75)"
