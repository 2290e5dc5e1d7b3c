"""The contact sheet shows what the records contain."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from maknet_jax.data import records
from maknet_jax.errors import InputError
from maknet_jax.figures import contact_sheet, picture, text


def make_example(value, labels=(1, 0), name="a slice"):
    image = np.full((16, 16, 3), -1024, np.int16)
    image[..., 1] = value
    image[:8, :8, 1] = 3000  # top left is bright: a flip would show
    labels = np.array(labels, np.uint8)
    return records.Example(name, image, labels, np.ones_like(labels), {})


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def test_the_window_maps_low_to_black_and_high_to_white():
    grey = picture.to_grey(np.array([-2000, -160, 40, 240, 3000], np.int16))
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey, [0, 0, 127, 255, 255])
    np.testing.assert_array_equal(picture.to_grey(np.array([0, 100]), (0, 100)), [0, 255])


@pytest.mark.parametrize("window", [(100, 100), (100, 0), (float("nan"), 0)])
def test_a_window_that_is_empty_or_reversed_is_rejected(window):
    with pytest.raises(InputError, match="{},{}".format(*window)):
        picture.to_grey(np.zeros(3, np.int16), window)


def test_tiles_lie_in_rows_upright_with_their_labels(tmp_path):
    path = tmp_path / "sheet.png"
    examples = [make_example(value) for value in (-160, 40, 240, -160, 40)]
    contact_sheet.write_contact_sheet(path, examples, ["liver", "spleen"], columns=3)
    sheet = read(path)
    assert sheet.shape[1] == 3 * 232 + 8
    for number, value in enumerate((0, 127, 255)):
        tile = sheet[31 : 31 + 224, 8 + 232 * number :][:, :224]
        assert tile[50, 50] == 255
        assert tile[50, 180] == tile[180, 180] == value
        below = sheet[31 + 226 : 31 + 226 + 30, 8 + 232 * number :][:, :224]
        assert (below > 128).sum() > 20, "there is no text below the picture"
    assert (sheet[300:, 8 + 2 * 232 :] < 30).all()  # five tiles: the last place is empty


def test_pictures_have_the_proportions_of_the_body(tmp_path):
    """A crop of 40 x 80 pixels was stretched to a square."""
    example = make_example(240)
    meta = {"crop": (0, 0, 40, 80), "spacing": (5.0, 1.0, 1.0), "split": "val"}
    wide = dataclasses.replace(example, meta=meta)
    path = tmp_path / "sheet.png"
    contact_sheet.write_contact_sheet(path, [wide], ["liver", "spleen"], columns=1)
    tile = read(path)
    bright = np.flatnonzero((tile == 255).sum(axis=1) > 150)
    assert bright[-1] - bright[0] + 1 == pytest.approx(112, abs=1)
    fields = contact_sheet.make_tiles([wide], ["liver", "spleen"])[0]
    assert fields["aspect"] == 2 and fields["note"] == "val" and fields["labels"] == "liver"
    assert "liver" in fields["alt"]


def test_labels_are_listed_in_full_or_counted():
    names = [f"label number {k}" for k in range(60)]
    few = contact_sheet._lines(make_example(0, labels=[1] * 6), names)
    assert ", ".join(names[:6]) in " ".join(line for line, _ in few)
    many = " ".join(line for line, _ in contact_sheet._lines(make_example(0, [1] * 60), names))
    listed = many.count("label number")
    assert 6 < listed < 60 and many.endswith(f"and {60 - listed} more")


def test_unknown_labels_are_marked():
    names = [f"label {k}" for k in range(40)]
    example = make_example(0, labels=[1, 0] + [0] * 38)
    example = dataclasses.replace(example, label_mask=np.array([1, 1] + [0] * 38, np.uint8))
    lines = contact_sheet._lines(example, names)
    known = [line for line, colour in lines if colour == contact_sheet._LABELS]
    unknown = " ".join(line for line, colour in lines if colour == contact_sheet._UNKNOWN)
    assert known == ["label 0"] and unknown.startswith("unknown: label 2, label 3")
    assert unknown.count("label") + int(unknown.split()[-2]) == 38
    (tile,) = contact_sheet.make_tiles([example], names)
    assert tile["labels"] == "label 0" and tile["unknown"].endswith("label 9, and 30 more")
    bare = dataclasses.replace(example, labels=np.zeros(0), label_mask=np.zeros(0))
    (tile,) = contact_sheet.make_tiles([bare], [])
    assert (tile["labels"], tile["unknown"]) == ("not labelled", "")


def test_long_ids_keep_their_ends():
    face = text.font(12)
    ids = [f"1.2.840.113619.2.55.3.604688119.{k}.{10**30}" for k in (868, 869)]
    short = [text.shorten(f"{name}:{k}", 200, face) for k, name in enumerate(ids)]
    assert short[0] != short[1] and short[0].endswith(":0")
    assert all(face.getlength(one) <= 200 for one in short)
    assert text.shorten("neck", 200, face) == "neck"


def test_long_and_non_ascii_names_and_few_examples_are_drawn(tmp_path):
    names = ["Lungenflügel rechts", "肝臓", "x" * 200]
    example = make_example(0, labels=(1, 1, 1), name="ü" * 100)
    contact_sheet.write_contact_sheet(tmp_path / "one.png", [example], names)
    contact_sheet.write_contact_sheet(tmp_path / "none.png", [], names)
    assert read(tmp_path / "none.png").shape < read(tmp_path / "one.png").shape
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
