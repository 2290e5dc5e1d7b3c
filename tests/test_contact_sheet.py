"""The contact sheet shows what the records contain."""

import numpy as np
import pytest
from PIL import Image

from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.figures import contact_sheet


def make_example(value, labels=(1, 0), name="a slice"):
    image = np.full((16, 16, 3), -1024, np.int16)
    image[..., 1] = value
    image[:8, :8, 1] = 3000  # top left is bright: a flip would show
    labels = np.array(labels, np.uint8)
    return records.Example(name, image, labels, labels, {})


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def test_the_window_maps_low_to_black_and_high_to_white():
    grey = contact_sheet.to_grey(np.array([-2000, -160, 40, 240, 3000], np.int16))
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey, [0, 0, 127, 255, 255])
    np.testing.assert_array_equal(contact_sheet.to_grey(np.array([0, 100]), (0, 100)), [0, 255])


@pytest.mark.parametrize("window", [(100, 100), (100, 0), (float("nan"), 0)])
def test_a_window_that_is_empty_or_reversed_is_rejected(window):
    with pytest.raises(InputError, match="{},{}".format(*window)):
        contact_sheet.to_grey(np.zeros(3, np.int16), window)


def test_tiles_lie_in_rows_upright_with_their_labels(tmp_path):
    path = tmp_path / "sheet.png"
    examples = [make_example(value) for value in (-160, 40, 240, -160, 40)]
    contact_sheet.write_contact_sheet(path, examples, ["liver", "spleen"], columns=3)
    sheet = read(path)
    height, width = sheet.shape
    assert width % 3 == 0 and height % 2 == 0
    wide, high = width // 3, height // 2
    for number, value in enumerate((0, 127, 255, 0, 127)):
        tile = sheet[number // 3 * high :, number % 3 * wide :][:high, :wide]
        assert tile[wide // 4, wide // 4] == 255
        assert tile[wide // 4, 3 * wide // 4] == tile[3 * wide // 4, wide // 4] == value
        assert (tile[wide:] > 128).sum() > 20, "there is no text below the picture"
    assert (sheet[high:, 2 * wide :] < 30).all()


def test_long_and_non_ascii_names_and_few_examples_are_drawn(tmp_path):
    names = ["Lungenflügel rechts", "肝臓", "x" * 200]
    example = make_example(0, labels=(1, 1, 1), name="ü" * 100)
    contact_sheet.write_contact_sheet(tmp_path / "one.png", [example], names)
    contact_sheet.write_contact_sheet(tmp_path / "none.png", [], names)
    assert read(tmp_path / "one.png").shape == read(tmp_path / "none.png").shape
    bare = make_example(0, labels=())
    contact_sheet.write_contact_sheet(tmp_path / "bare.png", [bare], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.png", "none.png", "one.png"]


def test_the_sample_is_fixed_and_covers_all_splits(shards):
    sources = [shards.source(name) for name in shards.info["splits"]]
    ids = [source[k].id for source in sources for k in range(len(source))]
    assert [example.id for example in shards.sample(len(ids) + 1)] == ids
    few = [example.id for example in shards.sample(7)]
    assert few == [example.id for example in shards.sample(7)]
    assert len(few) == 7 and set(few) < set(ids)
