"""`maknet perturb` from end to end."""

import csv
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import two_processes
from PIL import Image
from test_attribute import linear  # noqa: F401
from test_page import check_page

from maknet_jax import cli, perturb
from maknet_jax.attribution import perturbation
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import masks, results
from maknet_jax.explain.network import open_networks
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.explain.selection import SelectedImage, Selection


def rows_of(out):
    with (out / "perturbations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def seen():
    """The most influential pixels of each batch, and the images that were scored, in HU."""
    return {"_influential": [], "_scored": []}


@pytest.fixture(scope="module")
def done(trained, linear, phantom, tmp_path_factory, seen):  # noqa: F811
    out = tmp_path_factory.mktemp("perturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name, calls in seen.items():
            original = getattr(perturb, name)

            def spy(net, hu, *rest, original=original, calls=calls):
                result = original(net, hu, *rest)
                calls.append((net.name, hu, result))
                return result

            patch.setattr(perturb, name, spy)
        summary = perturb.perturb(
            trained,
            out,
            SelectionOptions(split="test", limit=6, compare=linear),
            PathOptions(steps=4),
            masks=phantom["masks"] / "deeplesion",
            organs=["liver", "soft tissue"],
        )
    return out, summary


def test_only_the_right_pixels_change(done, seen, shards, phantom):
    paths = sorted(done[0].glob("cases/*"))
    influential = {net: pixels for net, _, pixels in seen["_influential"]}
    assert len(influential) == 2 and len(seen["_scored"]) == 2 * len(paths)
    source, scored = shards.source("test"), iter(seen["_scored"])
    for path in paths:
        metadata, _ = results.load(path)
        number = int(path.stem)
        case = source[number]
        regions = masks.find_regions(
            case, masks=phantom["masks"] / "deeplesion", organs=["liver", "soft tissue"], size=32
        )
        for model in metadata["models"]:
            net, hu, _ = next(scored)
            assert net == model["name"]
            np.testing.assert_array_equal(hu[0], case.image)
            mask, changed = influential[net][number], (hu != hu[0]).any(axis=-1)
            assert 0 < mask.sum() <= round(0.1 * mask.size)
            for column, image, where in zip(model["columns"][1:], hu[1:], changed[1:], strict=True):
                strategy, _, name = column["title"].partition(": ")
                assert where.any()
                if strategy != "neighbour":
                    assert (image[where] == -1024).all()
                if strategy == "neighbour":
                    assert not (where & ~regions[name]).any()
                elif strategy == "patch":
                    box = perturbation.patch(np.zeros((32, 32, 1)), regions[name])[..., 0] != 0
                    np.testing.assert_array_equal(where, box & (hu[0] != -1024).any(axis=-1))
                elif strategy == "attribution":
                    np.testing.assert_array_equal(where, mask)
                else:  # as many pixels, and no air
                    assert where.sum() == mask.sum() and (where != mask).any()
                    assert perturbation.differs(hu[0], np.full_like(hu[0], -1024))[where].all()


def test_each_image_is_shown_before_and_after(done):
    out, summary = done
    for path in sorted(out.glob("cases/*")):
        metadata, arrays = results.load(path)
        for place, model in enumerate(metadata["models"]):
            titles = [column["title"] for column in model["columns"]]
            assert titles[0] == "original"
            assert "neighbour: soft tissue" in titles and "patch: soft tissue" in titles
            assert any(title.startswith("attribution") for title in titles)
            pictures = arrays[f"pictures_{place}"]
            assert pictures.shape == (len(titles), 32, 32)
        assert "regions" not in metadata  # masks are not stored


def test_labels_that_leave_the_first_are_marked_and_counted(done):
    out, summary = done
    rows = rows_of(out)
    images = summary["images"]
    assert {row["flags"] for row in rows} == {"phantom"}
    assert images == len(list(out.glob("cases/*"))) and summary["flags"] == {"phantom": images}
    assert f"flag phantom on {images} of {images} images" in (out / "index.html").read_text()
    for path in sorted(out.glob("cases/*")):
        metadata, _ = results.load(path)
        for model in metadata["models"]:
            first = {entry["label"] for entry in model["columns"][0]["labels"]}
            assert len(first) == 5
            for column in model["columns"][1:]:
                states = {entry["label"]: entry["state"] for entry in column["labels"]}
                assert first <= states.keys()
                for entry in column["labels"]:
                    state = "" if entry["rank"] <= 5 else "gone"
                    assert entry["state"] == (state if entry["label"] in first else "new")
    for result in summary["results"]:
        some = [
            row
            for row in rows
            if row["model"] == result["model"] and row["perturbed"].startswith(result["strategy"])
        ]
        each = {}
        for row in some:
            fall = float(row["before"]) - float(row["after"])
            each.setdefault(row["id"], {}).setdefault(row["perturbed"], []).append(fall)
        means = [np.mean([np.mean(falls) for falls in one.values()]) for one in each.values()]
        mean, low, high = result["fall"]
        assert mean == pytest.approx(np.mean(means), abs=1e-6) and low <= mean <= high
        assert result["images"] == len(each)


def test_the_page_shows_the_grid(done, shards):
    out, summary = done
    text = (out / "index.html").read_text()
    assert summary["labels"] == len(shards.vocabulary)
    assert check_page(text) > 20
    assert 'class="gone"' in text and "neighbour: soft tissue" in text
    assert text.count('<section class="card">') == len(list(out.glob("cases/*")))


def test_boxes_of_deeplesion_need_no_masks(trained, shards, tmp_path):
    out = tmp_path / "out"
    which = SelectionOptions(split="test", limit=3)
    perturb.perturb(trained, out, which, strategies=("patch",))
    for number in range(3):
        metadata, arrays = results.load(out / f"cases/{number:05d}.npz")
        original, patched = arrays["pictures_0"]
        assert (original != patched).any()
        assert (patched[original != patched] == 0).all()  # black


def test_all_kinds_of_masks_align_with_their_slice(tmp_path):
    plane = np.zeros((40, 60), np.uint8)
    plane[10:20, 5:25] = 3
    case = SelectedImage("a:1", None, None, {"crop": (0, 0, 40, 60), "file": "a_007.png"})
    expected = np.zeros((20, 20), bool)
    expected[5:10, 2:8] = True
    Image.fromarray(plane).save(tmp_path / "a_007.png")
    np.savez(tmp_path / "a.npz", **{"007": plane, "008": 0 * plane})
    volume = np.zeros((60, 40, 3), np.uint8)  # x, y, z
    volume[..., 1] = plane.T
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # z to the head: stored from the feet up
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "a.nii.gz")
    (tmp_path / "npz").mkdir()
    (tmp_path / "a.npz").rename(tmp_path / "npz" / "a.npz")
    (tmp_path / "npz" / "organs.json").write_text(json.dumps({"3": "liver"}))

    def region_of(name, organs=None, **meta):
        case.meta.update(meta)
        regions = masks.find_regions(case, masks=tmp_path / name, organs=organs, size=20)
        return next(iter(regions.values()))

    for name, organs in (
        ("a_007.png", None),
        (".", ["3"]),
        ("npz", ["liver"]),
        ("npz", ["3"]),
    ):
        region = region_of(name, organs)
        assert (region & expected).sum() / (region | expected).sum() > 0.75, name
    region = region_of("a.nii.gz", ["3"], slice=1, shape=(3, 40, 60), kind="dicom")
    assert (region & expected).sum() / (region | expected).sum() > 0.75
    with pytest.raises(Rejected):  # not in sight
        region_of("npz", ["4"])
    with pytest.raises(InputError, match="'spleen'"):
        region_of("npz", ["spleen"])
    with pytest.raises(Rejected, match="has 3 slices, but the series has 4:"):
        region_of("a.nii.gz", ["3"], shape=(4, 40, 60))
    with pytest.raises(Rejected, match="b_001"):
        region_of("npz", None, file="b_001.png")


def case_of(**meta):
    meta = {"crop": (0, 0, 40, 60), "file": "a_007.png"} | meta
    meta = {name: value for name, value in meta.items() if value is not None}
    return SelectedImage("a:1", None, None, meta)


def regions_of(case, path=None, organs=None):
    return masks.find_regions(case, masks=path, organs=organs, size=20)


def test_pixel_values_of_png_masks_are_the_labels(tmp_path):
    plane = np.zeros((40, 60), np.uint8)
    plane[10:20, 5:25] = 3
    path = tmp_path / "a.png"

    def region_of(picture, organ):
        picture.save(path)
        return next(iter(regions_of(case_of(), path, [organ]).values()))

    expected = region_of(Image.fromarray(plane), "3")
    palette = Image.fromarray(plane, "P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 99, 99, 99, 200, 0, 0])  # 3 is a red, of another grey
    np.testing.assert_array_equal(region_of(palette, "3"), expected)
    deep = Image.fromarray(np.where(plane, np.uint16(700), np.uint16(0)))
    np.testing.assert_array_equal(region_of(deep, "700"), expected)
    np.testing.assert_array_equal(region_of(Image.fromarray(plane > 0), "1"), expected)
    with pytest.raises(Rejected, match="RGB"):
        region_of(Image.fromarray(np.repeat(plane[..., None], 3, axis=-1)), "3")


def test_masks_that_do_not_match_the_slice_are_rejected(tmp_path):
    path = tmp_path / "a_007.png"
    Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(path)
    assert regions_of(case_of(shape=(5, 40, 60)), path)
    with pytest.raises(Rejected, match="40 x 60.*80 x 120"):
        regions_of(case_of(shape=(5, 80, 120)), path)  # though the crop would fit
    with pytest.raises(Rejected, match="40 x 60.*40 x 61"):
        regions_of(case_of(crop=(0, 1, 40, 61)), path)
    with pytest.raises(Rejected):  # a patch around a lesion
        regions_of(case_of(crop=None, box=(1, 1, 3, 3)), path)
    with pytest.raises(Rejected):
        regions_of(case_of(file=None), path)
    Image.fromarray(np.ones((40, 60), np.uint8)).save(path)
    with pytest.raises(Rejected, match="region"):
        regions_of(case_of(), path)
    nibabel.save(nibabel.Nifti1Image(np.ones((60, 40, 3), np.uint8), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(Rejected, match="a.nii"):
        regions_of(case_of(slice=1), tmp_path / "a.nii")


def test_boxes_of_deeplesion_count_from_1():
    crop = (0, 0, 20, 20)  # a pixel of the slice is one of the image
    region = regions_of(case_of(crop=crop, slice_box=(5, 9, 8, 12)))["lesion"]
    np.testing.assert_array_equal(np.argwhere(region)[[0, -1]], [[8, 4], [10, 6]])
    # A patch around a lesion has its box in its own pixels, from 0.
    patch = regions_of(case_of(crop=None, slice_box=(5, 9, 8, 12), box=(2, 3, 4, 5)))["lesion"]
    np.testing.assert_array_equal(np.argwhere(patch)[[0, -1]], [[3, 2], [4, 3]])


def test_changed_masks_are_changed_settings(trained, phantom, tmp_path):
    folder = tmp_path / "masks"
    shutil.copytree(phantom["masks"] / "deeplesion", folder / "deeplesion")
    shutil.copy(phantom["masks"] / "organs.json", folder)
    one = SelectionOptions(split="test", limit=1)
    given = {"strategies": ("patch",), "organs": ["soft tissue"]}
    for _ in range(2):
        perturb.perturb(trained, tmp_path / "out", one, masks=folder / "deeplesion", **given)
    (folder / "deeplesion" / "other.npz").write_bytes(b"new")
    with pytest.raises(InputError, match="masks_digest"):
        perturb.perturb(trained, tmp_path / "out", one, masks=folder / "deeplesion", **given)


@pytest.mark.parametrize(
    "options, expected_text",
    [
        (["--strategy", "blur"], "'blur'"),
        (["--masks", "nowhere"], "nowhere"),
        (["--masks", __file__], "test_perturb.py"),
        (["--masks", str(pathlib.Path(__file__).parent), "--organs", "nose"], "'nose'"),
        (["--baseline", "white"], "'white'"),
        (["--share", "2"], "--share"),
        (["--split", "nine"], "nine"),
    ],
    ids=" ".join,
)
def test_bad_input_exits_2_with_one_line(trained, tmp_path, capsys, options, expected_text):
    argv = ["perturb", "--workdir", str(trained), "--out", str(tmp_path / "out")]
    code = cli.main([*argv, *([] if "--split" in options else ["--split", "test"]), *options])
    error = capsys.readouterr().err
    assert code == 2 and expected_text in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_images_without_a_region_are_listed(trained, phantom, tmp_path, capsys):
    argv = ["perturb", str(phantom["dicom"]), "--workdir", str(trained), "--limit", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2  # none has a box
    assert "--masks" in capsys.readouterr().err
    argv += ["--strategy", "attribution,random", "--steps", "2"]  # need no region
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0  # the same folder
    printed = capsys.readouterr().out
    assert "attribution" in printed and "random" in printed


def selection_of(count, bad=()):
    """Images of one value each; `bad` cannot be read."""

    def read(number):
        if number in bad:
            raise Rejected("scan: a.dcm", "rows differ: 3 and 4")
        return SelectedImage(str(number), np.full((2, 2, 3), number, np.int16), None, {})

    reads = [lambda number=number: read(number) for number in range(count)]
    return Selection(reads, [], {"count": count})


def test_failures_keep_input_and_reason(tmp_path):
    def explain(out, selection):
        def explain_batch(batch):
            return [({"id": image.id}, {}) for image in batch.values()]

        return results.explain("title", out, selection, {}, explain_batch, batch_size=2)

    done, failures = explain(tmp_path / "some", selection_of(3, bad=[1]))
    assert list(done) == [0, 2]
    assert failures == [("scan: a.dcm", "rows differ: 3 and 4")]
    selection = selection_of(2)

    def broken():
        raise Rejected("rows differ: 3 and 4")

    selection.readers[1] = broken
    assert explain(tmp_path / "other", selection)[1] == [("image 1", "rows differ: 3 and 4")]
    with pytest.raises(InputError, match="rows differ: 3 and 4"):
        explain(tmp_path / "none", selection_of(2, bad=[0, 1]))
    assert not (tmp_path / "none").exists()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / ".settings.json.x.tmp").write_text("{")  # left by a killed process
    assert len(explain(tmp_path / "none", selection_of(4))[0]) == 4  # the folder was not claimed


SCRIPT = """
import test_perturb
from maknet_jax.explain import results
def explain_batch(batch):
    print("did", *batch)
    return [({"id": image.id, "by": number}, {}) for image in batch.values()]
selection = test_perturb.selection_of(7, bad=[4])
done, failures = results.explain("t", arguments[0], selection, {}, explain_batch, batch_size=2)
print("done", *done)
print("failed", *failures)
"""


def test_two_processes_share_the_images_and_lose_none(tmp_path):
    lines = two_processes.run(SCRIPT, tmp_path / "out", timeout=120)
    did = [[line for line in each if line.startswith("did")] for each in lines]
    assert did == [["did 0 2", "did 6"], ["did 1 3", "did 5"]]
    for each in lines:  # both know all
        assert each[-2:] == ["done 0 1 2 3 5 6", "failed ('scan: a.dcm', 'rows differ: 3 and 4')"]
    for number in (0, 1, 2, 3, 5, 6):
        metadata, _ = results.load(tmp_path / f"out/cases/{number:05d}.npz")
        assert metadata == {"id": str(number), "by": str(number % 2)}


def test_products_are_float32_in_the_backward_pass_too(trained):
    network = open_networks(trained)[0]

    def precisions(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                yield equation.params["precision"]
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from precisions(inner)

    highest = (jax.lax.Precision.HIGHEST,) * 2
    images = jnp.zeros((8, 32, 32, 3))
    forward = list(precisions(jax.make_jaxpr(network.logit_fn)(images).jaxpr))
    back = jax.make_jaxpr(jax.grad(lambda x: network.logit_fn(x).sum()))(images)
    back = list(precisions(back.jaxpr))
    assert len(back) > len(forward) > 3 and {*forward, *back} == {highest}
