"""One item ahead: order, overlap, and the ends."""

import pytest

from maknet_jax.data import prefetch


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_item_comes_after_the_next_was_drawn(count):
    drawn = []

    def items():
        for number in range(count):
            drawn.append(number)
            yield number

    for number in prefetch.one_ahead(items()):
        assert drawn == list(range(min(number + 2, count)))
    assert drawn == list(range(count))
    assert list(prefetch.one_ahead(range(count))) == list(range(count))
