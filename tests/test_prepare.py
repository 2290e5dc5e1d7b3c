"""`maknet prepare deeplesion` from files to records: the phantom and a real partial download."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from prepared import examples, read_csv

from maknet_jax import prepare
from maknet_jax.ct import png, preprocess
from maknet_jax.data import deeplesion, key_slices, labels, records
from maknet_jax.errors import InputError, Stopped
from maknet_jax.phantom import deeplesion_files
from maknet_jax.runs import ownership

# The environment of a command, without the simulated devices of the tests.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def of_phantom(phantom, out, **options):
    options = {"size": 32} | deeplesion_files(phantom) | options
    return prepare.prepare_deeplesion(out=out, **options)


def of_real(shared_data, out, images="Images_png", **options):
    lesanet = shared_data / "lesanet"
    options = {
        "label_file": lesanet / "text_mined_labels_171_and_split.json",
        "hand_labels": lesanet / "hand_labeled_test_set.json",
        "ontology": lesanet / "lesion_ontology_181022.xlsx",
        "size": 512,
    } | options
    return prepare.prepare_deeplesion(
        shared_data / "deeplesion" / images,
        shared_data / "deeplesion" / "DL_info_first_691_rows.csv",
        out,
        **options,
    )


@pytest.fixture(scope="session")
def real(shared_data, tmp_path_factory):
    """The partial download, prepared at the size of its slices: (summary, out)."""
    out = tmp_path_factory.mktemp("real") / "out"
    return of_real(shared_data, out), out


def test_a_folder_that_another_command_writes_is_refused_and_unchanged(phantom, tmp_path):
    out = tmp_path / "out"
    with ownership.owned(out, "maknet prepare", "--out"):
        before = sorted(out.rglob("*"))
        with pytest.raises(InputError, match="in use by `maknet prepare`"):
            of_phantom(phantom, out)
        assert sorted(out.rglob("*")) == before
    assert of_phantom(phantom, out)["records"]
    assert not (out / ownership.FILE).exists()


def test_lesions_of_a_partial_download_are_numbered_from_1(real, shared_data):
    summary, out = real
    assert "numbered from 1" in summary["about"]["numbering"]
    written = {e.id: e for split in examples(out).values() for e in split}
    names = records.open_dataset(out).vocabulary.names
    for name in ("000069_02_01_058#475", "000078_02_01_063#546"):
        labelled = {names[k] for k in np.flatnonzero(written[name].labels)}
        assert {"liver", "abdomen", "upper abdomen"} <= labelled
        assert written[name].meta["lesion_idx"] == int(name[-3:])


def test_every_missing_image_is_counted_and_listed(real):
    summary, out = real
    missing = read_csv(out / "missing.csv")
    counts = summary["about"]["label_counts"]
    expected = sum(count["kept"] for count in counts.values())
    total = sum(summary["records"].values())
    assert total >= 2 and len(missing) == expected - total == summary["about"]["images_missing"]
    assert all("Images_png" in row["reason"] for row in missing)
    assert counts["train"]["labelled"] == 17705
    assert [counts[s]["labelled"] for s in ("val", "test", "hand")] == [1686, 1640, 490]
    for count in counts.values():
        assert count["labelled"] == count["without_row"] + count["noisy"] + count["kept"]
    assert summary["failures"] == 0 and not (out / "failures.csv").exists()
    text = prepare.describe(summary)
    assert "17705" in text and "17697" in text and f"images missing: {len(missing)}" in text


def test_records_contain_the_exact_hu_of_deeplesion(real, shared_data):
    _, out = real
    written = {e.id: e for split in examples(out).values() for e in split}
    example = written["000069_02_01_058#475"]
    folder = shared_data / "deeplesion" / "Images_png" / "000069_02_01"
    with Image.open(folder / "058.png") as image:
        hu = np.asarray(image).astype(np.int32) - 32768
    hu = np.maximum(np.where(hu <= -2000, -1024, hu), -1024)
    top, left, bottom, right = example.meta["crop"]
    # The same box resized from the file.
    expected = preprocess.resize(hu.astype(np.int16), (top, left, bottom, right), 512)
    np.testing.assert_array_equal(example.image[..., 1], expected)
    assert 0 < top < bottom < 512 and hu[top:bottom, left:right].max() == hu[top:, :].max()
    # Its neighbours were not downloaded, so the slice is repeated.
    np.testing.assert_array_equal(example.image[..., 0], example.image[..., 1])
    np.testing.assert_array_equal(example.image[..., 2], example.image[..., 1])


def test_a_slice_filled_by_the_body_is_neither_cropped_nor_resized(shared_data, tmp_path):
    # The body fills slice 115, the last of its series.
    rows = read_csv(shared_data / "deeplesion" / "DL_info_first_691_rows.csv")[:1]
    rows[0]["File_name"] = "000001_01_01_115.png"
    with (tmp_path / "info.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    images = shared_data / "deeplesion" / "Images_png"
    summary = prepare.prepare_deeplesion(images, tmp_path / "info.csv", tmp_path / "out", size=512)
    (example,) = examples(tmp_path / "out")["unlabelled"]
    assert example.id == "000001_01_01_115" and example.labels.shape == (0,)
    assert example.meta["crop"] == [0, 0, 512, 512]
    assert summary["counters"] == {"neighbours repeated": 1}
    for channel, index in enumerate((114, 115, 115)):
        with Image.open(images / "000001_01_01" / f"{index}.png") as image:
            hu = np.asarray(image).astype(np.int32) - 32768
        assert hu.min() == -3024
        expected = np.where(hu == -3024, -1024, hu)
        np.testing.assert_array_equal(example.image[..., channel], expected)


def test_images_with_flat_names_are_read(shared_data, tmp_path):
    prepare.prepare_deeplesion(
        shared_data / "deeplesion" / "key_slices_flat",
        shared_data / "deeplesion" / "DL_info_key_slices.csv",
        tmp_path / "out",
        size=32,
    )
    written = examples(tmp_path / "out")["unlabelled"]
    assert len(written) == 23
    assert written[0].id == "002648_01_01_061"
    # Slices 49 and 50 of one series are neighbours.
    pair = {e.id: e.image for e in written if e.id.startswith("003657_01_01")}
    first, second = pair["003657_01_01_049"], pair["003657_01_01_050"]
    assert (first[..., 2] != first[..., 1]).any() and (first[..., 0] == first[..., 1]).all()
    assert (second[..., 0] != second[..., 1]).any() and (second[..., 2] == second[..., 1]).all()


def test_uncertain_labels_are_unknown_in_val_and_test_only(phantom, shards):
    mined = json.loads(phantom["labels"].read_text())
    vocabulary = shards.vocabulary
    assert {label.label_class for label in vocabulary.labels} == {"bodypart"}
    unknown = 0
    for split in ("train", "val", "test", "hand"):
        source = shards.source(split)
        for k in range(len(source)):
            example = source[k]
            if split in ("train", "hand"):
                assert example.label_mask.all()
                continue
            at = mined[f"{split}_lesion_idxs"].index(example.meta["lesion_idx"])
            for kind, value in (("relevant", 1), ("uncertain", 0)):
                for term in mined[f"{split}_{kind}_labels"][at]:
                    column = vocabulary.index.get(mined["term_list"][term])
                    if column is not None and value:
                        assert example.labels[column] == 1 and example.label_mask[column] == 1
                    elif column is not None and not example.labels[column]:
                        assert example.label_mask[column] == 0
                        unknown += 1
            assert not (example.labels & (1 - example.label_mask)).any()
    assert unknown > 0


def test_labels_match_the_label_files_and_their_counts(phantom, shards):
    mined = deeplesion.read_mined_labels(phantom["labels"])
    for split, entry in shards.info["splits"].items():
        source = shards.source(split)
        vectors = np.stack([source[k].labels for k in range(len(source))])
        np.testing.assert_array_equal(vectors.sum(0), entry["label_counts"])
        if split == "hand":
            continue
        for example in (source[k] for k in range(len(source))):
            mentioned = set(mined.relevant[example.meta["lesion_idx"]])
            if split == "train":
                mentioned |= set(mined.uncertain[example.meta["lesion_idx"]])
            named = {shards.vocabulary.names[k] for k in np.flatnonzero(example.labels)}
            assert named == mentioned & set(shards.vocabulary.names)
    assert (shards.path / "contact_sheet.png").is_file()


def test_uncertain_labels_and_their_ancestors_are_unknown_unless_certain_or_excluded():
    vocabulary = labels.Vocabulary(
        (
            labels.Label("abdomen"),
            labels.Label("liver", parents=("abdomen",)),
            labels.Label("liver mass", parents=("liver", "abdomen")),
            labels.Label("lung"),
            labels.Label("lung nodule", parents=("lung",)),
            labels.Label("pelvis"),
            labels.Label("spleen", exclusive=("liver",)),
        )
    )
    unknown = ("liver mass", "lung nodule", "elsewhere", "spleen")
    vectors = key_slices.label_vectors(vocabulary, ("liver",), unknown)
    vector, mask = (np.frombuffer(content, np.uint8) for content in vectors)
    # As in LesaNet, the ancestors of certain labels are not added.
    assert vector.tolist() == [0, 1, 0, 0, 0, 0, 0]
    # Abdomen is an ancestor of an uncertain label; the certain liver excludes the spleen.
    assert mask.tolist() == [0, 1, 0, 0, 0, 1, 1]


def test_more_labels_are_unknown_than_in_lesanet():
    vocabulary = labels.Vocabulary(
        (
            labels.Label("liver"),
            labels.Label("spleen", exclusive=("liver",)),
            labels.Label("splenic cyst", parents=("spleen",)),
            labels.Label("chest"),
            labels.Label("lung", parents=("chest",)),
            labels.Label("lung nodule", parents=("lung", "chest")),
        )
    )
    unknown = ("splenic cyst", "lung nodule")
    _, mask = key_slices.label_vectors(vocabulary, ("liver",), unknown)
    # LesaNet's closure lets the liver exclude the splenic cyst too, and it adds the direct parent
    # of the nodule only, so the chest would be known.
    assert np.frombuffer(mask, np.uint8).tolist() == [1, 1, 0, 0, 0, 0]


def test_the_fingerprint_does_not_depend_on_the_location_of_the_input(phantom, shards, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(phantom["images"])
    of_phantom(phantom | {"images": moved}, tmp_path / "out", workers=2)
    again = records.open_dataset(tmp_path / "out")
    assert again.fingerprint == shards.fingerprint
    for split in shards.info["splits"].values():
        for shard in split["shards"]:
            first, second = (root / shard["file"] for root in (shards.path, again.path))
            assert first.read_bytes() == second.read_bytes()


def test_bad_images_are_listed_and_the_rest_is_prepared(phantom, tmp_path):
    images = tmp_path / "images"
    for path in phantom["images"].rglob("*.png"):
        target = images / path.relative_to(phantom["images"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    rows = read_csv(phantom["info"])
    keys = [images / row["File_name"][:12] / row["File_name"][13:] for row in rows]
    lonely = next(
        key
        for key in keys
        if png.neighbour_path(key, 1).is_file() and png.neighbour_path(key, 1) not in keys
    )
    broken = png.neighbour_path(lonely, 1)
    other = next(key for key in keys if key.parent != lonely.parent)
    broken.unlink()
    broken.write_bytes(b"no picture")
    other.unlink()
    Image.new("L", (64, 64)).save(other)
    summary = of_phantom(phantom | {"images": images}, tmp_path / "out")
    failures = {row["input"]: row["reason"] for row in read_csv(tmp_path / "out" / "failures.csv")}
    assert set(failures) >= {str(lonely)}
    assert failures[str(lonely)] == f"{broken.name}: not a PNG file"
    assert any("8-bit PNG" in reason for reason in failures.values())
    assert summary["failures"] == len(read_csv(tmp_path / "out" / "failures.csv"))
    total = sum(summary["records"].values())
    expected = sum(count["kept"] for count in summary["about"]["label_counts"].values())
    assert total + summary["failures"] == expected and total > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "absent"}, "--images .*absent"),
        ({"labels": None}, "--labels .*--ontology"),
        ({"ontology": None}, "--labels .*--ontology"),
        ({"images": "."}, "--images"),
    ],
)
def test_inconsistent_inputs_are_refused(phantom, tmp_path, change, message):
    for key, value in change.items():
        change[key] = value and tmp_path / value
    with pytest.raises(InputError, match=message):
        of_phantom(phantom | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_and_folders_are_checked_before_anything_is_read(phantom, shards, tmp_path):
    for size in (48, 100):
        with pytest.raises(InputError, match=f"--size {size} .*32"):
            of_phantom(phantom | {"info": tmp_path / "absent"}, tmp_path / "out", size=size)
    with pytest.raises(InputError, match=str(shards.path)):
        of_phantom(phantom | {"info": tmp_path / "absent"}, shards.path)


def command(phantom, out):
    return [
        sys.executable,
        "-m",
        "maknet_jax",
        "prepare",
        "deeplesion",
        "--images",
        phantom["images"],
        "--info",
        phantom["info"],
        "--labels",
        phantom["labels"],
        "--hand-labels",
        phantom["hand_labels"],
        "--ontology",
        phantom["ontology"],
        "--out",
        out,
        "--size",
        "512",
        "--workers",
        "1",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_command_resumes_to_the_same_data(phantom, tmp_path, workers):
    run = {"env": ENVIRONMENT, "text": True, "capture_output": True, "timeout": 120}
    whole = subprocess.run(command(phantom, tmp_path / "whole"), **run)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    first = subprocess.Popen(
        [*command(phantom, out), f"--workers={workers}"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = time.monotonic()
    while not list(out.glob("train/.*")):  # the first shard is being written
        assert time.monotonic() - started < 60 and first.poll() is None
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGTERM)  # schedulers signal the workers too
    _, error = first.communicate(timeout=60)
    assert first.returncode == 75, error
    assert "SIGTERM" in error and error.count("\n") == 1
    assert not (out / "dataset.json").exists() and not list(out.glob("train/*"))
    second = subprocess.run(command(phantom, out), **run)
    assert second.returncode == 0 and second.stdout.replace(str(out), "X") == (
        whole.stdout.replace(str(tmp_path / "whole"), "X")
    )
    fingerprints = [records.open_dataset(tmp_path / name).fingerprint for name in ("whole", "out")]
    assert fingerprints[0] == fingerprints[1]
    third = subprocess.run(command(phantom, out), **run)
    assert third.returncode == 2 and third.stderr.count("\n") == 1
    assert str(out) in third.stderr


def test_a_signal_during_reading_is_not_reported_as_a_broken_file(phantom, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Stopped("SIGTERM")

    monkeypatch.setattr(png.Image, "open", interrupted)
    with pytest.raises(Stopped):
        of_phantom(phantom, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
