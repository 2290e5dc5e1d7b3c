"""Pictures of CT slices: proportions, resolution, and figures with scale bars."""

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from maknet_jax.ct import preprocess
from maknet_jax.data import deeplesion, records
from maknet_jax.errors import InputError
from maknet_jax.explain import drawing, results, selection, source_slices
from maknet_jax.figures import charts, overlay, panels, picture


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({"box": [1, 2, 3, 4], "slice_box": [5, 6, 7, 8], "spacing": [0.7, 0.8, 5]}, (1.0, 1.0)),
        ({"slice_box": [5, 6, 7, 8], "spacing": [0.7, 0.8, 5.0]}, (0.8, 0.7)),  # x, y, z
        ({"spacing": [5.0, 0.8, 0.7]}, (0.8, 0.7)),  # z, y, x
        ({"spacing": [5.0, None, None]}, None),
        ({"spacing": [float("nan")] * 3}, None),
        ({}, None),
    ],
)
def test_the_spacing_of_records_is_read_in_their_order(meta, expected):
    assert picture.pixel_spacing(meta) == expected


def test_network_images_are_drawn_in_the_proportions_of_the_body():
    meta = {"crop": (10, 20, 60, 120), "spacing": [3.0, 2.0, 1.5]}  # 100 mm high, 150 mm wide
    drawn = picture.of_image(np.full((64, 64), 40, np.int16), meta)
    assert drawn.grey.shape == (256, 384) and (drawn.grey == 127).all()
    assert drawn.mm == pytest.approx(150 / 384)
    assert not drawn.native and "64 x 64" in drawn.resolution
    unknown = picture.of_image(np.zeros((64, 64), np.int16), {"crop": (10, 20, 60, 120)})
    assert unknown.grey.shape == (192, 384) and unknown.mm is None


def test_ct_slices_keep_their_pixels():
    hu = np.random.default_rng(0).integers(-160, 240, (400, 500)).astype(np.int16)
    drawn = picture.of_slice(hu, (0.8, 0.8))
    np.testing.assert_array_equal(drawn.grey, picture.to_grey(hu))
    assert drawn.mm == pytest.approx(0.8) and drawn.native and "500 x 400" in drawn.resolution
    small = picture.of_slice(hu[:50, :100], (2.0, 1.0))  # pixels that are not square
    assert small.grey.shape == (384, 384) and small.mm == pytest.approx(100 / 384)
    assert small.stored == (50, 100)


def test_windows_are_described_as_radiologists_quote_them():
    text = picture.describe_window((-160, 240))
    assert all(part in text for part in ("-160 to 240 HU", "level 40", "width 400"))


def test_the_coronal_view_is_a_projection_along_the_rows():
    hu = np.full((5, 40, 600), -1000, np.int16)
    hu[2:, :, 300:] = 1000
    view, spacing = picture.coronal(hu, (5.0, 0.9, 0.8))
    assert spacing == (5.0, pytest.approx(2.4))
    assert view.shape == (5, 200) and view.dtype == np.uint8
    assert (view[:2] == 0).all() and (view[2:, 100:] == 255).all() and (view[2:, :100] == 0).all()


@pytest.mark.parametrize(
    "count, short", [(60, False), (20, False), (4, True)], ids=["long", "lower", "short"]
)
def test_the_coronal_view_is_to_scale_unless_it_is_short(tmp_path, monkeypatch, count, short):
    """Its size is that of the drawn axes, which titles, names and the colour bar make smaller."""
    drawn = []
    monkeypatch.setattr(charts, "_write", lambda figure, path: drawn.append(figure))
    confidences = np.full((count, 3), 0.9)
    charts.write_label_chart(
        tmp_path / "a.png",
        *(confidences, confidences > 0.5, ["a long name of a label", "b", "c"]),
        coronal=np.zeros((count, 80), np.uint8),
        spacing=(5.0, 2.0),
    )
    drawn[0].draw_without_rendering()
    view = drawn[0].axes[0]
    box = view.get_window_extent()
    stretch = (box.height / (count * 5)) / (box.width / 160)
    assert stretch > 2 if short else stretch == pytest.approx(1, abs=0.04)
    assert view.get_xlabel() == (f"stretched {stretch:.1f} x along z" if short else "")


def test_label_charts_show_the_coronal_view(tmp_path):
    confidences = np.linspace(0, 1, 12 * 3).reshape(12, 3)
    view = np.zeros((12, 30), np.uint8)
    names = ["neck", "chest", "a label"]
    arguments = confidences, confidences > 0.5, names
    charts.write_label_chart(tmp_path / "a.png", *arguments)
    charts.write_label_chart(
        tmp_path / "b.png", *arguments, title="1." * 99, coronal=view, spacing=(5.0, 5.0)
    )
    charts.write_label_chart(tmp_path / "c.png", confidences, confidences > 2, names, coronal=view)
    pictures = []
    for name in "abc":
        with Image.open(tmp_path / f"{name}.png") as opened:
            pictures.append(np.asarray(opened.convert("L")))
    black = [(one == 0).mean() for one in pictures]
    assert pictures[1].shape[1] > pictures[0].shape[1] and black[1] > black[0] + 0.1 < black[2]


def test_long_notes_are_wrapped_and_slices_outside_the_domain_hatched(tmp_path):
    note = "outside: unlike the training data, labels are unreliable " + "x" * 50
    lines = charts._wrap(["title", note], 24)
    assert lines[0] == "title" and all(len(line) <= 24 for line in lines)
    assert " ".join(lines[1:-1]) == note.rpartition(" ")[0] and "…" in lines[-1]
    confidences = np.zeros((12, 2))
    charts.write_label_chart(tmp_path / "a.png", confidences, confidences > 0, ["a", "b"])
    outside = {"notes": [note], "outside": np.arange(12) > 3}
    charts.write_label_chart(
        tmp_path / "b.png", confidences, confidences > 0, ["a", "b"], **outside
    )
    amber, heights = [], []
    for name in "ab":
        with Image.open(tmp_path / f"{name}.png") as opened:
            red, green, blue = np.moveaxis(np.asarray(opened.convert("RGB")).astype(int), -1, 0)
        amber.append((red > green + 25) & (green > blue + 25))
        heights.append(len(red))
    assert amber[0].sum() == 0 < amber[1].sum() and heights[1] > heights[0]


def deeplesion_record(shards, number=0):
    return shards.source("test")[number]


def test_records_of_deeplesion_are_drawn_from_its_images(shards, phantom):
    example = deeplesion_record(shards)
    part = source_slices.read_slice(example, phantom["images"])
    top, left, bottom, right = example.meta["crop"]
    assert part.shape == (bottom - top, right - left)
    assert part.shape[1] > len(example.image)  # sharper than the record
    resized = preprocess.resize(part, (0, 0, *part.shape), len(example.image))
    assert np.abs(resized.astype(int) - example.image[..., 1]).max() < 600  # other borders
    image = selection.SelectedImage(example.id, example.image, None, example.meta, slice_hu=part)
    fields, arrays = drawing.store_picture(image, (-160, 240))
    drawn = drawing.load_picture(fields, arrays, (-160, 240))
    assert drawn.native and drawn.stored == part.shape
    facts = drawing.facts({"meta": example.meta | {"split": "test"}}, drawn, (-160, 240))
    assert facts[0] == "split test" and "of the CT" in facts[-2]
    assert "which side is right" in facts[-1]  # DeepLesion's PNGs do not store directions


def test_other_slices_are_not_drawn(shards, phantom, tmp_path):
    example = deeplesion_record(shards)
    assert source_slices.read_slice(example, tmp_path) is None  # the image is not there
    other = records.Example(example.id, example.image + 9, None, None, example.meta)
    assert source_slices.read_slice(other, phantom["images"]) is None  # of another slice
    with pytest.raises(InputError, match="nowhere"):
        source_slices.check_folder(tmp_path / "nowhere")


def test_a_folder_with_none_of_the_ct_is_refused(shards, phantom, tmp_path):
    source = shards.source("test")
    numbers = range(len(source))
    source_slices.check_matches(source.__getitem__, numbers, phantom["images"])
    with pytest.raises(InputError, match=rf"none of 8 images .* {source[0].id}: pass the CT"):
        source_slices.check_matches(source.__getitem__, numbers, tmp_path)
    # A folder with the CT of one of the records is enough.
    whole = source_slices._plane(source[0].meta, phantom["images"])
    assert whole is not None
    first = source[0].meta["file"]
    path = deeplesion.find_image(phantom["images"], first)
    place = tmp_path / path.relative_to(phantom["images"])
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    source_slices.check_matches(source.__getitem__, numbers, tmp_path)
    unnamed = records.Example("x", source[0].image, None, None, {"series": "a"})
    with pytest.raises(InputError, match="do not name the slices they show: omit it"):
        source_slices.check_matches(lambda number: unnamed, numbers, phantom["images"])


def test_pictures_without_ct_are_counted(tmp_path):
    forms = ({"picture": {"native": True}}, {"picture": {"native": False}}, {})
    paths = [tmp_path / f"{number}.npz" for number in range(3)]
    for path, metadata in zip(paths, forms, strict=True):
        results.save(path, metadata, {"image": np.zeros((2, 2))})
    assert [results._count_without_ct(paths[:n]) for n in range(4)] == [0, 0, 1, 2]


def result(name, truths, **meta):
    """Metadata of a result with one network and the labels liver and lung."""
    labels = [
        {"label": label, "truth": truth, "reason": f"{name} {truth}", "outcome": truth}
        for label, truth in zip(("liver", "lung"), truths, strict=True)
    ]
    model = {"name": "m", "labels": labels, "missed": [[f"missed by {name}", 0.1, 0.3]]}
    return {"id": f"s#{name}", "meta": meta, "models": [model]}


def test_lesions_of_one_slice_share_a_card():
    whole = {"file": "1.png", "slice_box": [1, 2, 3, 4]}
    cases = [
        result("1", ("unknown", "false"), **whole),
        result("2", ("true", "unknown"), **whole),
        result("3", ("true", "true"), **whole | {"box": [1, 2, 3, 4]}),  # a patch around a lesion
        result("4", ("true", "true"), **whole | {"file": "2.png"}),
    ]
    paths = [pathlib.Path(f"{number}.npz") for number in range(4)]
    assert drawing.by_slice(zip(paths, cases, strict=True)) == [paths[:2], paths[2:3], paths[3:]]
    merged = drawing.merge_truth(cases[0], cases[1:2])
    assert merged["id"] == "s#1, #2"
    labels = merged["models"][0]["labels"]
    assert [label["truth"] for label in labels] == ["true", "false"]
    assert [label["reason"] for label in labels] == ["2 true", "1 false"]
    assert drawing.annotated(merged) == ["liver", "missed by 1", "missed by 2"]


def test_only_changed_pixels_of_perturbed_pictures_are_coarse():
    grey = np.random.default_rng(1).integers(1, 255, (40, 80)).astype(np.uint8)
    forms = np.full((2, 10, 10), 128, np.uint8)
    forms[1, :5, :5] = 0
    same, patched = drawing.perturbed_pictures(grey, forms)
    np.testing.assert_array_equal(same, grey)
    assert (patched[:18, :36] == 0).all()
    np.testing.assert_array_equal(patched[22:], grey[22:])
    np.testing.assert_array_equal(patched[:, 44:], grey[:, 44:])


@pytest.mark.parametrize(
    "meta, known",
    [
        ({"kind": "dicom"}, True),
        ({"kind": "png"}, False),
        ({"case": "s0001"}, True),
        ({"slice_box": [1, 2, 3, 4]}, False),
    ],
)
def test_the_side_is_marked_where_it_is_known(meta, known):
    assert picture.is_oriented(meta) is known


def explained(*changes):
    """(metadata, arrays) of a result whose two maps sum to `changes`, with 4 x 4 pixels."""
    maps = np.zeros((2, 64, 64, 3), np.float16)
    maps[:, 20:40, 20:40] = 1
    scale = np.array(changes, np.float32) / (400 * 3)
    labels = [
        {"label": name, "map": k, "flagged": False, "predicted": k == 0, "threshold": 0.4}
        | {"confidence": 0.01 + change, "baseline": 0.01, "change": change}
        for k, (name, change) in enumerate(zip(("liver", "lung"), changes, strict=True))
    ]
    metadata = {"id": "a:1", "meta": {"kind": "dicom"}}
    metadata |= {"models": [{"name": "m", "labels": labels, "missed": []}]}
    arrays = {"image": np.zeros((64, 64), np.int16), "maps_0": maps, "scale_0": scale}
    return metadata, arrays


def test_all_maps_of_an_image_share_one_scale():
    """A label of confidence 0.01 looks weaker than one of 0.83, by the ratio of the maps."""
    metadata, arrays = explained(0.82, -0.0082)
    (smoothed,) = drawing.smoothed_maps(arrays)
    scale = drawing.colour_scale([smoothed])
    assert scale == pytest.approx(0.82 / 400, rel=0.02)  # per pixel
    strong, weak = drawing.map_layers(smoothed, scale)
    assert strong[..., 3].max() == 255 and weak[..., 3].max() == round(255 * 0.01**0.7)
    # A second network shares it, too.
    _, other = explained(8.2, 0.82)
    both = arrays | {"maps_1": other["maps_0"], "scale_1": other["scale_0"]}
    assert drawing.colour_scale(drawing.smoothed_maps(both)) == pytest.approx(8.2 / 400, rel=0.02)
    arrays["scale_0"] = np.zeros(2, np.float32)
    # Nothing is drawn, and nothing is divided by 0.
    assert drawing.colour_scale(drawing.smoothed_maps(arrays)) == 1.0


def test_figures_state_confidence_threshold_baseline_and_scale(tmp_path, monkeypatch):
    metadata, arrays = explained(0.82, -0.0082)
    drawn = {}
    monkeypatch.setattr(
        panels, "write_panels", lambda path, rows, **more: drawn.update(more, rows=rows)
    )
    settings = {"display": (-160, 240), "output": "probability", "steps": 50}
    settings |= {"method": "trapezoid", "baseline": "black"}
    blur, blurred = overlay.smooth, []
    monkeypatch.setattr(overlay, "smooth", lambda one: blurred.append(1) or blur(one))
    drawing.write_overlays(tmp_path / "a.png", metadata, arrays, settings)
    assert len(blurred) == 2  # each map once
    ((_, (_, liver, lung)),) = drawn["rows"]
    assert liver.note.splitlines() == [
        "0.83, at or above its threshold 0.40",
        "baseline 0.01, change +0.82",
    ]
    assert lung.note.splitlines()[0] == "0.00, below its threshold 0.40"
    assert lung.note.endswith("change \N{MINUS SIGN}0.01")
    assert drawn["colour_bar"] == drawing.colour_scale(drawing.smoothed_maps(arrays))
    unit = "change of the confidence per pixel of the network's input (64 x 64)"
    assert unit in drawn["caption"][0]
    assert "change of the logit" in drawing.scale_unit(arrays, "logit")
    del metadata["models"][0]["labels"][0]["baseline"]  # of an earlier version
    assert drawing.describe_change(metadata["models"][0]["labels"][0], "logit") == "logit +0.82"


@pytest.mark.parametrize("width, length", [(400, 100), (300, 50), (60, 10), (20, 5), (5, 5)])
def test_scale_bars_have_round_lengths(width, length):
    assert panels.bar_length(width) == length


def test_figures_have_scale_bars_to_scale(tmp_path):
    """A panel of 340 pixels is drawn pixel by pixel: 100 mm at 1.5 mm per pixel are 67 pixels."""
    grey = np.zeros((200, 340, 3), np.uint8)
    path = tmp_path / "figure.png"
    rows = [("network", [panels.Panel(f"label {k}", "0.9", grey) for k in range(8)])]
    panels.write_panels(path, rows, mm=1.5, right=True, caption=["a caption " * 50])
    with Image.open(path) as opened:
        figure = np.asarray(opened.convert("L"))
    assert figure.shape[1] == 6 * 354 + 14  # eight panels in two rows
    first = figure[:300, 14:354]
    bar = np.flatnonzero((first[:, 30] == 255) & (first[:, 5] == 0))[-1]
    white = np.flatnonzero(first[bar] == 255)
    assert (white[0], len(white)) == (10, 68)
