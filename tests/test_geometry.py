"""The standard orientation: every stored orientation is undone, oblique ones are rejected."""

import itertools

import numpy as np
import pytest

from maknet_jax.ct import geometry
from maknet_jax.errors import Rejected

# z from head to feet (-superior), y to posterior, x to the left, in LPS.
STANDARD = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_axis_aligned_orientation_is_undone(order):
    volume = np.arange(24).reshape(2, 3, 4)
    for signs in itertools.product((1, -1), repeat=3):
        stored = volume.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
        directions = STANDARD[list(order)] * np.array(signs)[:, None]
        axes = geometry.standard_axes(directions)
        np.testing.assert_array_equal(geometry.to_standard(stored, axes), volume)


@pytest.mark.parametrize(("degrees", "accepted"), [(0, True), (29, True), (31, False), (90, True)])
def test_axes_are_within_30_degrees_of_the_body(degrees, accepted):
    angle = np.radians(degrees)
    turn = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    if accepted:
        assert sorted(axis for axis, _ in geometry.standard_axes(STANDARD @ turn)) == [0, 1, 2]
    else:
        with pytest.raises(Rejected, match=f"{degrees} degrees"):
            geometry.standard_axes(STANDARD @ turn)
