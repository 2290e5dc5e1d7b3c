"""`read_ahead`: order, exceptions, and one item ahead of the caller."""

import threading

import pytest

from maknet_jax.ct.read_ahead import read_ahead


def test_items_come_in_order_with_their_content():
    pairs = [(item, content.result()) for item, content in read_ahead(lambda x: x * x, range(5))]
    assert pairs == [(number, number * number) for number in range(5)]
    assert list(read_ahead(abs, [])) == []


def test_an_exception_belongs_to_its_item():
    contents = dict(read_ahead(lambda x: 6 // x, [1, 0, 3]))
    with pytest.raises(ZeroDivisionError):
        contents[0].result()
    assert (contents[1].result(), contents[3].result()) == (6, 2)


def test_only_one_item_is_read_ahead():
    started = [threading.Event() for _ in range(4)]

    def read(number):
        started[number].set()
        return number

    items = read_ahead(read, range(4))
    for number in range(3):
        assert next(items)[1].result() == number
        assert started[number + 1].wait(10)  # while the caller works on `number`
        assert not any(event.is_set() for event in started[number + 2 :])
