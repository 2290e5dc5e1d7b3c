"""The experiments on organs of real patients, on generated cases: controls, fits and resuming."""

import json

import jax
import numpy as np
import organ_cases
import pytest
from scipy import ndimage

from benchmarks.experiments import (
    attribution_organs,
    attribution_sanity,
    calibration,
    organ_maps,
    perturbation_organs,
)
from maknet_jax import console, prepare, train
from maknet_jax.attribution import perturbation
from maknet_jax.data import records
from maknet_jax.errors import InputError, Rejected
from maknet_jax.explain import masks
from maknet_jax.explain.network import open_networks
from maknet_jax.runs import config

MASKS = {"cord": [9] * 8 + [0] * 4, "gland": [0, 0, *[40] * 6, 0, 0, 0, 0]}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Six patients; the second has no contour of the gland."""
    root = tmp_path_factory.mktemp("cases")
    for n in range(6):
        drawn = {"cord": MASKS["cord"]} if n == 1 else MASKS
        organ_cases.write_case(root / f"pt_{n}", drawn, n)
    return root


@pytest.fixture(scope="module")
def prepared(cases, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "cases"
    rows = [(f"pt_{n}", "val" if n % 2 else "train") for n in range(6)]
    console.write_table(out.parent / "splits.csv", ("case", "split"), rows)
    splits = prepare.SplitOptions(out.parent / "splits.csv")
    prepare.prepare_segmentations([cases], out, size=32, splits=splits)
    return records.open_dataset(out)


def test_masks_of_a_case_are_cropped_like_its_records(cases, prepared):
    for split in ("train", "val"):
        source = prepared.source(split)
        for example in (source[k] for k in range(len(source))):
            z, crop = example.meta["slice"], example.meta["crop"]
            expected = {
                name: perturbation.mask_region(organ_cases.organ(MASKS[name])[z], crop, 32)
                for name, known in zip(MASKS, example.label_mask, strict=True)
                if known and MASKS[name][z]
            }
            if not expected:
                continue
            regions = masks.find_regions(example, masks=cases, organs=list(MASKS), size=32)
            assert regions.keys() == expected.keys()
            for name, region in regions.items():
                np.testing.assert_array_equal(region, expected[name])
            union = masks.find_regions(example, masks=cases, organs=None, size=32)["region"]
            np.testing.assert_array_equal(union, np.any(list(expected.values()), axis=0))
    assert masks.check_masks(cases, ["cord", "gland"]) == masks.check_masks(cases, ["cord"])
    with pytest.raises(InputError, match="nose"):
        masks.check_masks(cases, ["nose"])


def test_a_case_without_masks_or_with_another_series_is_rejected(cases, prepared, tmp_path):
    example = prepared.source("val")[0]
    with pytest.raises(Rejected, match=example.meta["case"]):
        masks.find_regions(example, masks=tmp_path, organs=None, size=32)
    example.meta["slices"] = 11
    with pytest.raises(Rejected, match="12 slices"):
        masks.find_regions(example, masks=cases, organs=None, size=32)


def test_random_regions_have_the_shape_of_the_organ_and_do_not_touch_it():
    body = np.zeros((20, 20), bool)
    body[2:18, 2:18] = True
    region = np.zeros_like(body)
    region[5:8, 5:10] = region[8, 5] = True
    generator, tops = np.random.default_rng(0), set()
    for _ in range(40):
        control = perturbation_organs.random_region(region, body, generator)
        assert control.sum() == region.sum() == 16
        assert not (control & region).any() and not (control & ~body).any()
        top, left = np.argwhere(control).min(axis=0)
        np.testing.assert_array_equal(control[top : top + 4, left : left + 5], region[5:9, 5:10])
        tops.add((int(top), int(left)))
    assert len(tops) > 20
    body[:, 10:] = body[9:] = False  # the shape fits nowhere, but as many pixels do
    control = perturbation_organs.random_region(region, body, generator)
    assert control.sum() == 16 and not (control & (region | ~body)).any()


def test_random_pixels_are_as_clustered_as_those_of_the_map():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(64, 64))
    smooth = ndimage.gaussian_filter(noise, 3, mode="wrap")
    body = np.zeros((64, 64), bool)
    body[8:56, 8:56] = True

    def neighbours(mask):
        return (mask[1:] & mask[:-1]).sum() / mask.sum()

    shares = []
    for values in (noise, smooth):
        mask = perturbation_organs.random_pixels(values, body, 200, generator)
        assert mask.sum() == 200 and not (mask & ~body).any()
        shares.append(neighbours(mask))
    assert shares[0] < 0.2 and shares[1] > 0.7


def test_the_fits_recover_a_temperature_a_slope_and_an_offset():
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=3, size=40_000)
    labels = generator.random(40_000) < 1 / (1 + np.exp(-logits / 2))
    assert calibration.fit_temperature(logits, labels) == pytest.approx(2, rel=0.05)
    labels = generator.random(40_000) < 1 / (1 + np.exp(-(0.7 * logits - 1)))
    assert calibration.fit_line(logits, labels) == pytest.approx((0.7, -1), abs=0.05)
    assert calibration.fit_line(logits, labels | True) == (1, 0)
    slope, offset = calibration.fit_line(logits, logits > 0)  # separable
    assert 1 < slope < 100 and abs(offset) < 1


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    confidences = np.array([0.1, 0.3, 0.9, 1.0, 0.2])
    labels = np.array([0, 1, 1, 1, 0])
    sums = calibration.bin_sums(confidences, labels, np.array([0, 0, 0, 0, 1]), 2)
    np.testing.assert_allclose(sums[0], [[2, 0.4, 1], [2, 1.9, 2]])
    np.testing.assert_allclose(calibration.calibration_error(sums), [0.7 / 4, 0.2])
    assert calibration.calibration_error(sums.sum(axis=0)) == pytest.approx((0.4 + 0.1) / 5)


def test_each_fold_is_scored_with_the_fit_to_the_others():
    generator = np.random.default_rng(1)
    logits, patients = generator.normal(scale=4, size=(600, 2)), np.repeat(list("abcdef"), 100)
    labels = generator.random((600, 2)) < 1 / (1 + np.exp(-logits / 3))
    scored = calibration.Scored(logits, labels, np.ones((600, 2), bool), patients)
    chosen = calibration.argparse.Namespace(split="val", fit_split="val", folds=3)
    forms, temperature = calibration.calibrate({"val": scored}, chosen)
    assert temperature == pytest.approx(3, rel=0.2)
    ratios = (logits / forms["temperature"].logits).round(9)
    assert len(np.unique(ratios)) == 3  # one temperature per fold
    for patient in "abcdef":
        assert len(np.unique(ratios[patients == patient])) == 1
    chosen.split = "test"
    forms, again = calibration.calibrate({"val": scored, "test": scored}, chosen)
    assert again == temperature
    np.testing.assert_allclose(forms["temperature"].logits, logits / temperature)
    np.testing.assert_array_equal(forms["as trained"].logits, logits)


def test_means_are_over_patients_and_pairs_over_shared_patients():
    rows = [{"patient": "a", "label": "x", "value": v} for v in (1, 3)]
    rows += [{"patient": "b", "label": "y", "value": 6}]
    means = organ_maps.by_patient(rows, lambda row: row["value"])
    assert means == {"a": 2, "b": 6}
    assert organ_maps.interval(means)[0] == 4
    assert organ_maps.paired(means, {"b": 1, "c": 9}) == (5, 5, 5)
    assert organ_maps.paired(means, {"c": 9}) is None
    ratio, low, high = organ_maps.ratio_interval(means, {"a": 1, "b": 1})
    assert (ratio, low, high) == (4, 2, 6)
    assert organ_maps.with_enough_patients(rows) == {"x", "y"}
    rows += [{"patient": str(n), "label": "x"} for n in range(19)]
    assert organ_maps.with_enough_patients(rows) == {"x"}


def test_weights_are_randomised_from_the_output_to_the_input(trained):
    net = open_networks(trained, devices=jax.local_devices()[:1])[0]
    layers = ["stem", "block_0", "mixpool_1", "block_1", "classifier", "spl"]
    assert attribution_sanity.layers_of(net) == layers
    variants = attribution_sanity.randomised(net, 3, 0)
    assert list(variants) == [
        "original",
        "random down to classifier",
        "random down to mixpool_1",
        "random down to stem",
    ]
    original, head, *_, everything = (variant["params"] for variant in variants.values())
    kernel = original["classifier"]["kernel"]
    assert (head["classifier"]["kernel"] != kernel).any()
    np.testing.assert_array_equal(
        np.sort(head["classifier"]["kernel"], axis=None), np.sort(kernel, axis=None)
    )
    for params, equal in ((head, True), (everything, False)):
        changed = params["stem"]["conv"]["kernel"], original["stem"]["conv"]["kernel"]
        assert np.array_equal(*changed) == equal


def test_shuffled_labels_are_the_same_rows_beside_other_images(prepared, tmp_path):
    out = attribution_sanity.shuffle_labels(prepared, "train", tmp_path, 0)
    assert attribution_sanity.shuffle_labels(prepared, "train", tmp_path, 0) == out
    shuffled = records.open_dataset(out)
    assert shuffled.fingerprint != prepared.fingerprint
    rows = []
    for dataset in (prepared, shuffled):
        source = dataset.source("train")
        rows.append([source[k] for k in range(len(source))])
    for one, other in zip(*rows, strict=True):
        assert one.id == other.id and np.array_equal(one.image, other.image)
    before, after = ([(*e.labels, *e.label_mask) for e in part] for part in rows)
    assert before != after and sorted(before) == sorted(after)


def test_a_network_memorises_some_images_only(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution_sanity, "MEMORISED", 3)
    out = attribution_sanity.shuffle_labels(prepared, "train", tmp_path, 0)
    other = attribution_sanity.shuffle_labels(prepared, "train", tmp_path, 1)
    chosen, entry = (
        records.open_dataset(out).source("train"),
        records.open_dataset(out).split("train"),
    )
    assert len(chosen) == entry["count"] == 3 < len(prepared.source("train"))
    assert (
        entry["label_counts"]
        == np.sum([chosen[k].labels * chosen[k].label_mask for k in range(3)], axis=0).tolist()
    )
    assert (
        entry["known_counts"] == np.sum([chosen[k].label_mask for k in range(3)], axis=0).tolist()
    )
    assert [chosen[k].id for k in range(3)] != [
        records.open_dataset(other).source("train")[k].id for k in range(3)
    ]


@pytest.mark.slow
def test_the_experiments_run_and_resume(cases, prepared, tmp_path):
    changes = [f"data.path={prepared.path}", "data.size=32", "epochs=4", "evaluate_every=2"]
    train.train(config.load("linear", changes), tmp_path / "run")
    run = str(tmp_path / "run")
    argv = ["--quick", "--workdirs", f"{run},{run}", "--masks", str(cases), "--least", "0"]
    for module in (attribution_organs, perturbation_organs, attribution_sanity):
        name, extra = module.__name__.rpartition(".")[2], argv
        if module is attribution_sanity:
            extra = [*argv[:-2], "--random-labels", "4"]
        arguments = [
            *extra,
            "--folder",
            str(tmp_path / name),
            "--out",
            str(tmp_path / f"{name}.json"),
        ]
        module.main(arguments)
        first = json.loads((tmp_path / f"{name}.json").read_text())
        (cases_folder,) = (tmp_path / name).glob("**/cases")
        times = {path: path.stat().st_mtime_ns for path in cases_folder.iterdir()}
        next(iter(times)).unlink()
        module.main(arguments)  # only the missing image is explained again
        again = {path: path.stat().st_mtime_ns for path in cases_folder.iterdir()}
        assert sum(again[path] != times[path] for path in times) == 1
        second = json.loads((tmp_path / f"{name}.json").read_text())
        results = [
            {key: value for key, value in each.items() if key not in ("date", "device")}
            for each in (first, second)
        ]
        assert results[0] == results[1]
    written = json.loads((tmp_path / "attribution_organs.json").read_text())
    assert list(written["networks"]) == [f"linear ({tmp_path.name}/run)"] * 1 + [
        f"linear ({tmp_path.name}/run) again"
    ]
    assert written["difference"]["mean"]["inside"] == [0, 0, 0]
    written = json.loads((tmp_path / "perturbation_organs.json").read_text())["changes"]
    assert written["attribution"]["first minus second"]["drop"] == [0, 0, 0]
    written = json.loads((tmp_path / "attribution_sanity.json").read_text())["networks"]
    first = next(iter(written.values()))
    assert list(first) == ["original", "random down to classifier", "random labels"]
    assert first["original"]["signed"] == [1, 1, 1]
    assert first["random down to classifier"]["signed"][0] < 0.9
    arguments = [
        "--workdirs",
        run,
        "--folds",
        "2",
        "--bins",
        "4",
        "--folder",
        str(tmp_path / "cal"),
    ]
    arguments += ["--out", str(tmp_path / "cal.json")]
    calibration.main(arguments)
    (tmp_path / "run").rename(tmp_path / "moved")
    arguments[1] = str(tmp_path / "moved")
    calibration.main(arguments)  # the logits are read again
    written = json.loads((tmp_path / "cal.json").read_text())
    forms = [key for key in written if key.startswith("linear (")]
    assert [key.partition(", ")[2] for key in forms] == list(calibration.FORMS)
    for form in forms:
        assert set(written[form]) == {"all", *MASKS}
        assert 0 <= written[form]["all"]["ece"][0] <= 1
