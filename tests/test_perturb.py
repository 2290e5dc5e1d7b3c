"""`maknet perturb` from end to end."""

import csv
import json

import nibabel
import numpy as np
import pytest
from PIL import Image
from test_attribute import check_page, linear  # noqa: F401

from maknet_jax import cases, cli, perturb
from maknet_jax.errors import InputError, Rejected


def rows_of(out):
    with (out / "perturbations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(trained, linear, phantom, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("perturbed") / "out"
    summary = perturb.perturb(
        trained, out, split="test", limit=6, steps=4, compare=linear,
        masks=phantom["masks"] / "deeplesion", organs=["liver", "soft tissue"],
    )  # fmt: skip
    return out, summary


def test_each_image_is_shown_whole_and_perturbed(done):
    out, summary = done
    for path in sorted(out.glob("cases/*")):
        about, arrays = cases.load(path)
        for place, model in enumerate(about["models"]):
            titles = [column["title"] for column in model["columns"]]
            assert titles[0] == "original"
            assert "neighbour: soft tissue" in titles and "patch: soft tissue" in titles
            assert any(title.startswith("attribution") for title in titles)
            pictures = arrays[f"pictures_{place}"]
            assert pictures.shape == (len(titles), 32, 32)
            for title, picture in zip(titles[1:], pictures[1:], strict=True):
                assert (picture != pictures[0]).any() or title.startswith(("attr", "rand"))
        assert "regions" not in about  # masks are not kept


def test_what_falls_out_of_the_first_is_marked_and_counted(done):
    out, summary = done
    rows = rows_of(out)
    for path in sorted(out.glob("cases/*")):
        about, _ = cases.load(path)
        for model in about["models"]:
            first = {entry["label"] for entry in model["columns"][0]["labels"]}
            assert len(first) == 5
            for column in model["columns"][1:]:
                states = {entry["label"]: entry["state"] for entry in column["labels"]}
                assert first <= states.keys()
                for entry in column["labels"]:
                    state = "" if entry["rank"] <= 5 else "gone"
                    assert entry["state"] == (state if entry["label"] in first else "new")
    for result in summary["results"]:
        some = [row for row in rows if row["model"] == result["model"]
                and row["perturbed"].startswith(result["strategy"])]  # fmt: skip
        each = {}
        for row in some:
            fall = float(row["before"]) - float(row["after"])
            each.setdefault(row["id"], {}).setdefault(row["perturbed"], []).append(fall)
        means = [np.mean([np.mean(falls) for falls in one.values()]) for one in each.values()]
        mean, low, high = result["fall"]
        assert mean == pytest.approx(np.mean(means), abs=1e-6) and low <= mean <= high
        assert result["images"] == len(each)


def test_the_page_shows_the_grid(done):
    out, _ = done
    text = (out / "index.html").read_text()
    assert check_page(text) > 20
    assert 'class="gone"' in text and "neighbour: soft tissue" in text
    assert text.count('<section class="card">') == len(list(out.glob("cases/*")))


def test_boxes_of_deeplesion_need_no_masks(trained, shards, tmp_path):
    out = tmp_path / "out"
    perturb.perturb(trained, out, split="test", limit=3, strategies=("patch",))
    for number in range(3):
        about, arrays = cases.load(out / f"cases/{number:05d}.npz")
        original, patched = arrays["pictures_0"]
        assert (original != patched).any()
        assert (patched[original != patched] == 0).all()  # black


def test_masks_of_all_kinds_lie_on_their_slice(tmp_path):
    plane = np.zeros((40, 60), np.uint8)
    plane[10:20, 5:25] = 3
    case = cases.Case("a:1", None, (), (), {"crop": (0, 0, 40, 60), "file": "a_007.png"})
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

    def found(masks, organs=None, **meta):
        case.meta.update(meta)
        regions = perturb.find_regions(case, masks=tmp_path / masks, organs=organs, size=20)
        return next(iter(regions.values()))

    for masks, organs in (
        ("a_007.png", None), (".", ["3"]), ("npz", ["liver"]), ("npz", ["3"]),
    ):  # fmt: skip
        region = found(masks, organs)
        assert (region & expected).sum() / (region | expected).sum() > 0.75, masks
    region = found("a.nii.gz", ["3"], slice=1)
    assert (region & expected).sum() / (region | expected).sum() > 0.75
    with pytest.raises(Rejected, match="in sight"):
        found("npz", ["4"])
    with pytest.raises(InputError, match="'spleen'"):
        found("npz", ["spleen"])
    with pytest.raises(Rejected, match="no slice"):
        found("a.nii.gz", ["3"], slice=3)
    with pytest.raises(Rejected, match="no mask"):
        found("npz", None, file="b_001.png")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--strategy", "blur"], "'blur'"),
        (["--masks", "nowhere"], "nowhere"),
        (["--share", "2"], "--share"),
        (["--split", "nine"], "nine"),
    ],
    ids=" ".join,
)
def test_bad_input_exits_2_with_one_line(trained, tmp_path, capsys, options, says):
    argv = ["perturb", "--workdir", str(trained), "--out", str(tmp_path / "out")]
    code = cli.main([*argv, *([] if "--split" in options else ["--split", "test"]), *options])
    error = capsys.readouterr().err
    assert code == 2 and says in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_images_without_a_region_are_listed(trained, phantom, tmp_path, capsys):
    argv = ["perturb", str(phantom["dicom"]), "--workdir", str(trained), "--limit", "2"]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 2  # not one has a box
    assert "--masks" in capsys.readouterr().err
    argv += ["--strategy", "attribution,random", "--steps", "2"]  # need no region
    assert cli.main([*argv, "--out", str(tmp_path / "other")]) == 0
    assert "confidence falls by" in capsys.readouterr().out
