"""`maknet attribute` from end to end, and its HTML page."""

import csv
import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image
from test_page import check_page

from maknet_jax import attribute, cli, train
from maknet_jax.attribution import faithfulness, perturbation
from maknet_jax.attribution import integrated_gradients as ig
from maknet_jax.errors import InputError
from maknet_jax.explain import results
from maknet_jax.explain.network import open_networks
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.figures import picture
from maknet_jax.runs import config, workdir
from maknet_jax.training import augment

NINE = SelectionOptions(split="test", limit=9)
FEW_STEPS = PathOptions(steps=6, refine=0)


@pytest.fixture(scope="module")
def linear(shards, tmp_path_factory):
    """A second network on the same data."""
    folder = tmp_path_factory.mktemp("runs") / "linear"
    changes = [f"data.path={shards.path}", "data.size=32", "data.batch_size=16", "epochs=2"]
    train.train(config.load("linear", [*changes, "model.options.edge=4"]), folder)
    return folder


@pytest.fixture(scope="module")
def done(trained, linear, tmp_path_factory):
    """(folder, summary) of nine images by two networks."""
    out = tmp_path_factory.mktemp("maps") / "out"
    both = dataclasses.replace(NINE, compare=linear)
    return out, attribute.attribute(trained, out, both, FEW_STEPS, faithful=True)


def rows_of(out, name="attributions.csv"):
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_index_lists_the_maps_of_every_image(done, trained, shards):
    out, summary = done
    index = json.loads((out / "index.json").read_text())
    source = shards.source("test")
    run = workdir.open_run(trained)
    assert summary["images"] == len(index) == 9
    for number, entry in enumerate(index):
        example = source[number]
        assert (entry["number"], entry["id"]) == (number, example.id)
        metadata, arrays = results.load(out / entry["file"])
        np.testing.assert_array_equal(arrays["image"], example.image[..., 1])
        for model in (0, 1):
            assert arrays[f"maps_{model}"].shape == (5, 32, 32, 3)
            labels = entry["models"][model]["labels"]
            explained = [label["label"] for label in labels if label["map"] is not None]
            # Both networks are explained for the top labels of the first one.
            assert explained == [label["label"] for label in entry["models"][0]["labels"]]
            assert len(explained) == 5 and (model or len(labels) == 5)
            confidences = [label["confidence"] for label in labels[0 if model == 0 else 5 :]]
            assert confidences == sorted(confidences, reverse=True)
            for label in labels:
                column = run.vocabulary.index[label["label"]]
                excluded = (run.vocabulary.exclusive[column] & (example.labels > 0)).any()
                if not example.label_mask[column]:
                    assert label["truth"] == "unknown"
                elif example.labels[column]:
                    assert label["truth"] == "true"
                else:  # mined labels
                    assert label["truth"] == ("false" if excluded else "unknown")
                assert label["predicted"] == (label["confidence"] >= label["threshold"] < 1)
        meta = entry["meta"]
        assert meta["split"] == "test"
        assert entry["picture"]["native"] is False and entry["picture"]["stored"] == [32, 32]
        assert arrays["picture"].shape == picture.of_image(example.image[..., 1], meta).grey.shape
        with Image.open(out / entry["overlay"]) as figure:
            assert figure.size[0] == 6 * 354 + 14  # the CT and five maps, in two rows


def test_maps_are_complete_and_confidences_match_the_run(done, trained, shards):
    out, summary = done
    run = workdir.open_run(trained)
    hu = np.stack([shards.source("test")[k].image for k in range(8)])
    logits = run.predict(run.variables, {"image": hu})["logits"]
    scores = 1 / (1 + np.exp(-logits))
    for number, expected in enumerate(scores):
        metadata, arrays = results.load(out / f"cases/{number:05d}.npz")
        model = metadata["models"][0]
        maps = arrays["maps_0"].astype(np.float32) * arrays["scale_0"][:, None, None, None]
        for label in model["labels"]:
            column = run.vocabulary.index[label["label"]]
            assert label["confidence"] == pytest.approx(expected[column], abs=1e-4)
            total = maps[label["map"]].sum()
            # Stored in half precision.
            assert total == pytest.approx(label["change"] + label["residual"], abs=2e-2)


def test_the_table_matches_the_index(done):
    out, summary = done
    index = json.loads((out / "index.json").read_text())
    entries = [
        (case["id"], model["name"], label)
        for case in index
        for model in case["models"]
        for label in model["labels"]
        if label["map"] is not None
    ]
    rows = rows_of(out)
    assert len(rows) == len(entries) == 9 * 2 * 5
    for row, (name, model, label) in zip(rows, entries, strict=True):
        assert (row["id"], row["model"], row["label"]) == (name, model, label["label"])
        assert float(row["relative"]) == pytest.approx(label["relative"])
        assert (row["flagged"] == "True") == (float(row["relative"]) > 0.01)
        assert (row["truth"], row["reason"]) == (label["truth"], label["reason"])
        assert (row["predicted"] == "True") == label["predicted"]
    for name, share in summary["complete"].items():
        flags = [row["flagged"] == "True" for row in rows if row["model"] == name]
        assert share == pytest.approx(1 - np.mean(flags))
        assert summary["flagged"][name] == sum(flags)


def test_faithfulness_has_intervals(done):
    out, summary = done
    index = json.loads((out / "index.json").read_text())
    assert len(summary["faithfulness"]) == 2
    for place, areas in enumerate(summary["faithfulness"].values()):
        assert tuple(areas) == attribute.AREAS
        for area, (mean, low, high) in areas.items():
            assert 0 <= low <= mean <= high <= 1
            each = [case["models"][place]["areas"][area] for case in index]
            assert mean == pytest.approx(np.mean(each), abs=1e-6)


def test_two_networks_are_compared_by_one_label_on_the_same_images(done, linear, shards):
    out, summary = done
    index = json.loads((out / "index.json").read_text())
    groups = [case["id"][:6] for case in index]  # DeepLesion's patients
    assert summary["groups"] == len(set(groups)) > 1
    one, two = summary["faithfulness"]
    areas = []
    for case in index:
        first, second = case["models"]
        assert first["areas_of"] == second["areas_of"] == first["labels"][0]["label"]
        areas.append([first["areas"], second["areas"]])
    # Recomputed for the second network, on an image where its own first label differs.
    seconds = [case["models"][1] for case in index]

    own = [max(model["labels"], key=lambda label: label["confidence"]) for model in seconds]
    number = next(k for k in range(9) if own[k]["label"] != seconds[k]["areas_of"])
    model = seconds[number]
    column, net = shards.vocabulary.index[model["areas_of"]], open_networks(linear)[0]
    hu = np.repeat(shards.source("test")[number].image[None], 8, axis=0)
    images, black = net.put(hu), net.put(np.full_like(hu, -1024))
    maps = ig.integrated_gradients(net.logit_fn, images, [[column]] * 8, black, steps=6).maps
    random = faithfulness.random_ranks(perturbation.differs(hu[:1], -1024), number)
    for order, names in (
        (faithfulness.ranks(maps[:, 0].sum(-1)), ("deletion", "insertion")),
        (random.repeat(8, axis=0), ("random deletion", "random insertion")),
    ):
        curves = faithfulness.curves(
            net.logit_fn, images, [column] * 8, black, order, attribute.SHARES
        )
        for name, curve in zip(names, curves, strict=True):
            area = faithfulness.area(curve[0], attribute.SHARES)
            assert model["areas"][name] == pytest.approx(area, abs=1e-4), name
    expected = {
        f"{area}, {one} minus {two}": [a[area] - b[area] for a, b in areas]
        for area in ("deletion", "insertion")
    }
    for place, name in enumerate((one, two)):
        for area in ("deletion", "insertion"):
            expected[f"{name}: {area}, map minus random"] = [
                pair[place][area] - pair[place][f"random {area}"] for pair in areas
            ]
    assert summary["differences"].keys() == expected.keys()
    for name, values in expected.items():
        reference = faithfulness.bootstrap(values, groups)
        assert summary["differences"][name] == pytest.approx(reference, abs=1e-6)
        assert name in (out / "index.html").read_text()


def test_the_page_shows_everything_and_works_offline(done):
    out, _ = done
    text = (out / "index.html").read_text()
    index = json.loads((out / "index.json").read_text())
    slices = {case["meta"]["file"]: case["id"] for case in reversed(index)}  # lesions share a card
    # A CT alone and under each of two maps, the maps, and a map for each label to tap.
    assert check_page(text) == len(slices) * (1 + 2 * 2 + 2 * 5)
    for case in index:
        assert slices[case["meta"]["file"]] in text
        for model in case["models"]:
            assert model["name"] in text
            for label in model["labels"]:
                assert f'class="{label["outcome"]}"' in text
    assert 'type="range"' in text and "raises" in text and "lowers" in text


def test_annotated_labels_outside_the_first_are_listed(done, shards):
    out, _ = done
    names = shards.vocabulary.names
    for case, number in zip(json.loads((out / "index.json").read_text()), range(9), strict=True):
        truth = {names[k] for k in np.flatnonzero(shards.source("test")[number].labels)}
        for model in case["models"]:
            shown = {label["label"] for label in model["labels"]}
            assert {name for name, *_ in model["missed"]} == truth - shown


def test_an_interrupted_run_neither_repeats_nor_loses_an_image(
    done, trained, linear, tmp_path, monkeypatch
):
    out, wrote, save = tmp_path / "out", [], results.save
    both = dataclasses.replace(NINE, compare=linear)

    def again(path=FEW_STEPS):
        return attribute.attribute(trained, out, both, path, faithful=True)

    def killed(path, *rest):
        if len(wrote) == 3:
            raise KeyboardInterrupt
        save(path, *rest)
        wrote.append(path.name)

    monkeypatch.setattr(results, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert not (out / "index.json").exists() and len(list(out.glob("cases/*"))) == 3
    monkeypatch.setattr(
        results, "save", lambda path, *rest: [save(path, *rest), wrote.append(path.name)]
    )
    again()
    assert sorted(wrote) == [f"{number:05d}.npz" for number in range(9)]
    for number in range(9):  # as without the interruption, in any batch
        (metadata, arrays), (other, expected) = (
            results.load(folder / f"cases/{number:05d}.npz") for folder in (out, done[0])
        )
        assert metadata["id"] == other["id"]
        for name, array in arrays.items():
            np.testing.assert_allclose(
                array.astype(np.float32), expected[name].astype(np.float32), atol=2e-3, rtol=1e-3
            )
    assert again()["images"] == 9
    assert len(wrote) == 9  # nothing is repeated
    with pytest.raises(InputError, match="steps.*6.*7"):
        again(dataclasses.replace(FEW_STEPS, steps=7))
    change_weights(monkeypatch)  # after as many updates: trained again, or averaged
    with pytest.raises(InputError, match="networks"):
        again()


def change_weights(monkeypatch):
    opened = workdir.open_run

    def open_changed(*args, **options):
        run = opened(*args, **options)
        params = jax.tree.map(lambda leaf: leaf * 1.001, run.variables["params"])
        return dataclasses.replace(run, variables=run.variables | {"params": params})

    monkeypatch.setattr(workdir, "open_run", open_changed)


def test_labels_select_images_and_targets(trained, shards, tmp_path):
    source, names = shards.source("test"), shards.vocabulary.names
    counts = np.sum([source[k].labels for k in range(len(source))], axis=0)
    name = names[int(np.argmax(np.where(counts < len(source), counts, 0)))]
    out = tmp_path / "out"
    two_steps = PathOptions(steps=2)
    which = SelectionOptions(split="test", labels=[name], limit=4)
    attribute.attribute(trained, out, which, two_steps)
    has = [source[k] for k in range(len(source)) if source[k].labels[names.index(name)]]
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [example.id for example in has[:4]]
    assert {row["label"] for row in rows} == {name}
    metadata, arrays = results.load(out / "cases/00000.npz")
    assert arrays["maps_0"].shape[0] == 1
    assert len(metadata["models"][0]["labels"]) in (5, 6)  # the first five are always listed
    check_page((out / "index.html").read_text())
    which = SelectionOptions(split="test", ids=[has[1].id, has[0].id])
    by_id = attribute.attribute(trained, tmp_path / "ids", which, two_steps)
    assert by_id["images"] == 2
    without = next(
        source[k].id
        for k in range(len(source))
        if source[k].id not in {example.id for example in has}
    )
    which = SelectionOptions(split="test", ids=[has[0].id, without], labels=[name])
    with pytest.raises(InputError, match=f"{without}.*{name}"):
        attribute.attribute(trained, tmp_path / "no", which)


def test_networks_that_take_a_box_are_refused(trained, tmp_path, monkeypatch):
    opened = workdir.open_run
    box = types.SimpleNamespace(takes_box=True)

    def with_box(*args, **options):
        run = opened(*args, **options)
        return dataclasses.replace(run, assembly=dataclasses.replace(run.assembly, model=box))

    monkeypatch.setattr(workdir, "open_run", with_box)
    with pytest.raises(InputError, match="needs a lesion's box"):
        attribute.attribute(trained, tmp_path / "out", NINE)
    assert not (tmp_path / "out").exists()


def test_a_refused_command_leaves_no_folder(trained, tmp_path):
    out = tmp_path / "out"
    for wrong in ({"baseline": "white"}, {"refine": 2, "method": "gauss"}, {"output": "loss"}):
        with pytest.raises(InputError):
            attribute.attribute(trained, out, NINE, PathOptions(**wrong))
        assert not out.exists(), wrong


def test_unreadable_files_are_listed_and_the_rest_is_explained(trained, phantom, tmp_path, capsys):
    scans = tmp_path / "scans"
    shutil.copytree(sorted(phantom["dicom"].iterdir())[0], scans / "good")
    (scans / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    argv = ["attribute", str(scans), "--workdir", str(trained), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--limit", "20", "--steps", "2"]) == 3
    printed = capsys.readouterr().out
    assert "failures.csv" in printed and "index.html" in printed
    failures = rows_of(tmp_path / "out", "failures.csv")
    assert [pathlib.Path(row["input"]).name for row in failures] == ["bad.png"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failures"] == 1


def test_black_is_minus_1024_hu_before_the_window(trained, shards):
    network = open_networks(trained)[0]
    low, high = network.run.config.data.window
    hu = np.full((8, 32, 32, 3), -1024, np.int16)
    np.testing.assert_allclose(network.put(hu), (-1024 - low) / (high - low), atol=1e-6)
    assert np.asarray(augment.to_unit(hu, (-2048, 2048)))[0, 0, 0, 0] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "options, expected_text",
    [
        ([], "--split"),
        (["--split", "nine"], "nine"),
        (["--split", "test", "--labels", "nose"], "'nose'"),
        (["--split", "test", "--ids", "nobody"], "'nobody'"),
        (["--split", "test", "--baseline", "white"], "'white'"),
        (["--split", "test", "--compare", "nowhere"], "nowhere"),
        (["nowhere"], "nowhere"),
        (["--split", "test", "--display=9,1"], "LOW"),
    ],
    ids=" ".join,
)
def test_bad_input_exits_2_with_one_line(trained, tmp_path, capsys, options, expected_text):
    argv = ["attribute", "--workdir", str(trained), "--out", str(tmp_path / "out"), *options]
    try:
        code = cli.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and expected_text in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/cases/*"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    argv = ["attribute", "--workdir", str(trained), "--out", str(full), "--split", "test"]
    assert cli.main(argv) == 2
