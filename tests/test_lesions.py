"""Lesion patches: geometry computed by hand, missing slices, and prepared records."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image
from prepared import examples
from scipy import ndimage

from maknet_jax import prepare
from maknet_jax.ct import reading
from maknet_jax.data import lesions, pipeline, records
from maknet_jax.errors import InputError, Rejected

FLAT = [np.full((200, 240), value, np.int16) for value in (10, 20, 30)]


def levels(offset):
    """A series whose slice number n is 100 n HU throughout."""
    return np.full((4, 4), 100 * offset, np.int16)


@pytest.mark.parametrize(
    "interval, behind",
    [(2.0, 100), (1.0, 200), (5.0, 40), (0.8, 250), (3.0, 200 / 3), (math.nan, 0), (0.0, 0)],
)
def test_the_three_slices_are_2_mm_apart(interval, behind):
    before, middle, after = lesions.three_slices(levels, interval)
    np.testing.assert_allclose(after, behind, rtol=1e-6)
    np.testing.assert_allclose(before, -behind, rtol=1e-6)
    np.testing.assert_array_equal(middle, 0)


def test_padding_is_air_before_it_is_interpolated():
    slices = lesions.three_slices(lambda offset: np.full((4, 4), [0, -3024][offset > 0]), 4.0)
    np.testing.assert_array_equal(slices[2], -512)  # midway between 0 and air, not padding


def test_the_patch_has_1_mm_pixels_and_is_centred_on_the_box():
    """On a ramp, the pixel at u + 1/2 mm shows the slice at (u + 1/2) / spacing - 1/2."""
    row, column = np.mgrid[0:300, 0:400].astype(np.float32)
    box, spacing = (196.0, 147.0, 204.0, 157.0), (0.8, 0.5)
    image, inside = lesions.make_patch([column, row + column, row], box, spacing)
    assert image.shape == (120, 120, 3) and image.dtype == np.int16
    # Middle of the box: x (196 + 204) / 2 * 0.8 = 160, y 152 * 0.5 = 76 mm; the patch starts 60 mm
    # before it, and the box is 8 * 0.8 mm wide and 10 * 0.5 mm high.
    np.testing.assert_allclose(inside, (56.8, 57.5, 63.2, 62.5))
    x, y = (np.arange(100, 220) + 0.5) / 0.8 - 0.5, (np.arange(16, 136) + 0.5) / 0.5 - 0.5
    np.testing.assert_allclose(image[..., 0], np.broadcast_to(x, (120, 120)), atol=0.51)
    np.testing.assert_allclose(image[..., 2], np.broadcast_to(y[:, None], (120, 120)), atol=0.51)
    np.testing.assert_allclose(image[..., 1], x + y[:, None], atol=0.51)


def test_borders_are_repeated_and_the_box_stays_at_the_lesion():
    corner = [np.arange(48000).reshape(200, 240).astype(np.float32)] * 3
    image, inside = lesions.make_patch(corner, (0, 0, 10, 20), (1.0, 1.0), size=40)
    # The middle is (5, 10): 15 columns and 10 rows are missing.
    assert inside == (15.0, 10.0, 25.0, 30.0)
    assert (image[:10, :, 0] == image[10, :, 0]).all()
    assert (image[:, :15, 0] == image[:, [15], 0]).all()
    assert image[10, 15, 0] == 0 and image[11, 16, 0] == 241
    image, inside = lesions.make_patch(FLAT, (0, 0, 239, 199), (1.0, 1.0), size=40)
    assert inside == (0.0, 0.0, 40.0, 40.0)  # larger than the patch
    assert (image == [10, 20, 30]).all()


@pytest.mark.parametrize(
    "box, spacing, field",
    [
        ((5, 5, 4, 9), (1, 1), "box"),
        ((5, 5, math.nan, 9), (1, 1), "box"),
        ((1, 1, 2, 2), (0, 1), "spacing"),
        ((1, 1, 2, 2), (math.nan,) * 2, "spacing"),
    ],
)
def test_invalid_boxes_and_spacings_are_rejected(box, spacing, field):
    with pytest.raises(Rejected, match=field):
        lesions.make_patch(FLAT, box, spacing)


NOT_CT = reading.Overrides(assume_hu=True)  # slices of one value each


def test_missing_slices_are_replaced_by_the_nearest(tmp_path):
    for number in (7, 8, 9, 11):
        pixels = np.full((30, 30), 32768 + 100 * number, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{number:03d}.png")

    def values(number, interval):
        path, box = tmp_path / f"{number:03d}.png", (10, 10, 20, 20)
        image, _, repeated = lesions.patch_of_png(path, box, (1, 1, interval), 24, NOT_CT)
        assert (image == image[0, 0]).all()
        return *image[0, 0].tolist(), repeated

    assert values(8, 2.0) == (700, 800, 900, 0)
    assert values(9, 1.0) == (700, 900, 1100, 0)
    assert values(8, 1.0) == (700, 800, 900, 2)  # 006 and 010 are missing: 007 and 009
    assert values(9, 5.0) == (860, 900, 900, 1)  # 010 is missing: the middle slice itself
    assert values(11, 0.8) == (850, 1100, 1100, 2)  # half of 009 and half of 008


@pytest.fixture(scope="module")
def patches(phantom, tmp_path_factory):
    """The phantom's lesions: (summary, out)."""
    out = tmp_path_factory.mktemp("lesions") / "out"
    files = {name: phantom[name] for name in ("hand_labels", "ontology")}
    label_file = phantom["labels"]
    images, info = phantom["images"], phantom["info"]
    options = {"patches": True, "size": 64, "label_file": label_file}
    return prepare.prepare_deeplesion(images, info, out, **files, **options), out


def test_records_hold_all_labels_and_the_box(patches):
    summary, out = patches
    dataset = records.open_dataset(out)
    classes = {label.label_class for label in dataset.vocabulary.labels}
    assert classes == {"bodypart", "type", "attribute"}
    assert dataset.info["kind"] == "lesions" and dataset.info["crop"] == lesions.RULE
    kinds = np.array([label.label_class for label in dataset.vocabulary.labels])
    counts = np.asarray(dataset.split("train")["label_counts"])
    assert all(counts[kinds == kind].sum() > 10 for kind in classes)
    for split in examples(out).values():
        for example in split:
            box = np.asarray(example.meta["box"])
            assert example.image.shape == (64, 64, 3)
            assert (box[:2] < box[2:]).all() and (box >= 0).all() and (box <= 64).all()
            # The lesion is centred in the patch, up to rounding and clipping.
            if (box > 0).all() and (box < 64).all():
                np.testing.assert_allclose((box[:2] + box[2:]) / 2, 32, atol=0.51)
    batch = next(pipeline.ordered_batches(dataset.source("train"), batch_size=4))
    assert batch["box"].shape == (4, 4) and batch["box"].dtype == np.float32
    assert f"neighbours repeated: {summary['counters']['neighbours repeated']}" in (
        prepare.describe(summary)
    )


def test_only_ancestors_of_uncertain_labels_are_unknown_in_training(patches):
    """The uncertain labels themselves are positive (paper, section 4.2)."""
    _, out = patches
    vocabulary = records.open_dataset(out).vocabulary
    implied = {parent for parents in vocabulary.parents for parent in parents}
    unknown = set()
    for example in examples(out)["train"]:
        assert not (example.labels & (1 - example.label_mask)).any()
        unknown |= set(np.flatnonzero(example.label_mask == 0).tolist())
    assert unknown and unknown <= implied


def test_every_lesion_is_a_record_also_without_labels(phantom, tmp_path):
    summary = prepare.prepare_deeplesion(
        phantom["images"], phantom["info"], tmp_path / "out", patches=True, size=32
    )
    assert summary["records"] == {"unlabelled": phantom["counts"]["lesions"]}
    with pytest.raises(InputError, match="--size 100 .*8"):
        prepare.prepare_deeplesion(
            phantom["images"], phantom["info"], tmp_path / "other", patches=True, size=100
        )


def test_boxes_are_dropped_when_mixed_with_images_without_a_box(patches):
    source = records.open_dataset(patches[1]).source("train")
    bare = [dataclasses.replace(source[k], meta={}) for k in range(8)]
    assert "box" in next(pipeline.mixed_batches([source, source], [4, 4], seed=0))
    mixed = next(pipeline.mixed_batches([source, bare], [4, 4], seed=0))
    assert "box" not in mixed and mixed["image"].shape == (8, 64, 64, 3)


def test_real_lesions_are_centred_in_their_patches(shared_data, tmp_path):
    """Lesion 475 (base 1) is in the liver; its patch shows the slice at its box, in HU."""
    from test_prepare import of_real

    of_real(shared_data, tmp_path / "out", patches=True, size=120)
    by_id = {e.id: e for split in examples(tmp_path / "out").values() for e in split}
    names = records.open_dataset(tmp_path / "out").vocabulary.names
    example = by_id["000069_02_01_058#475"]
    assert len(names) == 171
    assert {"liver", "abdomen"} <= {names[k] for k in np.flatnonzero(example.labels)}
    for one in by_id.values():
        x0, y0, x1, y1 = one.meta["box"]
        assert abs(x0 + x1 - 120) <= 1 and abs(y0 + y1 - 120) <= 1  # rounded to whole millimetres
        spacing, place = one.meta["spacing"], one.meta["slice_box"]
        assert x1 - x0 == pytest.approx((place[2] - place[0]) * spacing[0], abs=1e-3)
    path = shared_data / "deeplesion" / "Images_png" / "000069_02_01" / "058.png"
    hu = np.asarray(Image.open(path)).astype(np.float32) - 32768
    (left, top), (x0, y0) = np.array(example.meta["slice_box"][:2]) - 1, example.meta["box"][:2]
    u = np.arange(10, 110)

    def apart(x, y):
        """Mean difference in HU if the patch were shifted by x, y mm."""
        grid = np.meshgrid(
            top + (u - y0 + y) / example.meta["spacing"][1],
            left + (u - x0 + x) / example.meta["spacing"][0],
            indexing="ij",
        )
        shown = ndimage.map_coordinates(hu, grid, order=1)
        return np.abs(shown - example.image[10:110, 10:110, 1]).mean()

    assert apart(0, 0) < 10 < 20 < min(apart(x, y) for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1)))
