"""`maknet prepare segmentations`: splits, reports, workers and resuming, and the command line."""

import itertools
import json
import multiprocessing

import numpy as np
import organ_cases
import pytest
from prepared import examples, read_csv
from test_containers import pack

from maknet_jax import cli, prepare
from maknet_jax.data import records, segmentations, shards
from maknet_jax.errors import InputError
from maknet_jax.prepare import Rules, SplitOptions

HALF = {"train": 0.5, "val": 0.5}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Two folders of six and two cases; some organs are missing or empty."""
    root = tmp_path_factory.mktemp("cases")
    for n in range(8):
        masks = {"cord": [20] * (6 + n % 3) + [0] * (6 - n % 3)}
        if n != 1:
            masks["liver"] = [0] * 12 if n == 2 else [0, 0, 4, 9, 20, 20, 9, 4, 0, 0, 0, 0]
        organ_cases.write_case(root / ("a" if n < 6 else "b") / f"pt_{n}", masks, n)
    return root


def run(folders, out, **options):
    return prepare.prepare_segmentations(folders, out, size=32, **options)


def members(out):
    """Case -> split, from the records."""
    return {e.meta["case"]: split for split, rows in examples(out).items() for e in rows}


def test_a_zip_of_cases_gives_the_records_of_its_folder(cases, tmp_path):
    """Also the splits of the table in it, and names for which a spreadsheet needs an apostrophe."""
    content = {
        path.relative_to(cases / "b").as_posix().replace("pt_6", "=pt_6"): path.read_bytes()
        for path in sorted((cases / "b").rglob("*.nii.gz"))
    }
    content["meta.csv"] = b"image_id;split\n'=pt_6;val\npt_7;train\n"
    for name, data in content.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    for source in (tmp_path / "folder", pack(tmp_path / "a.zip", content)):
        run([source], tmp_path / f"{source.name}.out", workers=2)
    folder, packed = (examples(tmp_path / f"{name}.out") for name in ("folder", "a.zip"))
    assert {split: len(rows) for split, rows in packed.items()} == {"val": 12, "train": 12}
    for split, rows in folder.items():
        for one, other in zip(rows, packed[split], strict=True):
            assert (one.id, one.meta) == (other.id, other.meta)
            np.testing.assert_array_equal(one.image, other.image)
            np.testing.assert_array_equal(one.label_mask, other.label_mask)


def test_counts_separate_known_and_unknown_labels(cases, tmp_path):
    rules = Rules(every=2, unknown_below=("cord",))
    origin = {"source": "Ours: neck", "citation": "A. Author 2020", "licence": "CC BY 4.0"}
    summary = run([cases / "a"], tmp_path / "out", rules=rules, origin=origin)
    dataset = records.open_dataset(tmp_path / "out")
    assert dataset.info["kind"] == "segmentations" and dataset.size == 32
    assert dataset.origin == {"kind": "segmentations"} | origin
    assert dataset.info["about"]["rules"] == {
        "min_area_mm2": 50.0,
        "every": 2,
        "missing_is_absent": False,
        "unknown_below": ["cord"],
    }
    assert dataset.vocabulary.names == ("cord", "liver")
    rows = [e for split in examples(tmp_path / "out").values() for e in split]
    assert len(rows) == 36 == sum(summary["records"].values())
    known = np.sum([e.label_mask for e in rows], axis=0).tolist()
    present = np.sum([e.labels for e in rows], axis=0).tolist()
    # Cord is known down to its lowest contour at slice 5, 6 or 7: 3, 3 or 4 of the slices 1, 3 ..
    assert present[0] == known[0] == 2 * (3 + 3 + 4)
    # Liver is unknown in two cases, and at slice 7 (24 mm2) of the other four.
    assert known[1] == 4 * 5 and present[1] == 4 * 2
    total = np.sum([e["known_counts"] for e in dataset.info["splits"].values()], axis=0)
    assert total.tolist() == known
    table = read_csv(tmp_path / "out" / "label_counts.csv")
    assert sum(int(row["known"]) for row in table if row["label"] == "liver") == known[1]
    assert sum(int(row["unknown"]) for row in table if row["label"] == "liver") == 36 - known[1]
    assert summary["counters"] == {
        "empty masks": 1,
        "organs without a mask": 1,
        "labels unknown: area below --min-area": 4,
        "labels unknown: below the lowest contour": 36 - known[0],
        "labels unknown: empty mask": 6,
        "labels unknown: no mask": 6,
    }
    assert (tmp_path / "out" / "contact_sheet.png").stat().st_size > 1000
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_missing_is_absent(cases, tmp_path):
    rules = Rules(missing_is_absent=True)
    run([cases / "a"], tmp_path / "out", rules=rules)
    rows = [e for split in examples(tmp_path / "out").values() for e in split]
    absent = [e for e in rows if e.meta["case"] in ("pt_1", "pt_2")]
    assert len(absent) == 24
    assert all(e.label_mask[1] == 1 and e.labels[1] == 0 for e in absent)


def test_splits_by_a_hash_of_the_patient(cases, tmp_path):
    options = {"splits": SplitOptions(shares=HALF, seed=4)}
    run([cases / "a"], tmp_path / "a", **options)
    run([cases / "a", f"test={cases / 'b'}"], tmp_path / "ab", **options)
    first, both = members(tmp_path / "a"), members(tmp_path / "ab")
    assert set(first.values()) == {"train", "val"}
    assert both == first | {"pt_6": "test", "pt_7": "test"}
    assert records.open_dataset(tmp_path / "ab").info["about"]["patients"]["test"] == 2
    rows = {row["case"]: row["split"] for row in read_csv(tmp_path / "ab" / "cases.csv")}
    assert rows == both


def test_splits_from_a_table(cases, tmp_path):
    table = tmp_path / "splits.csv"
    table.write_text("case,split,patient\npt_0,train,p\npt_3,train,p\npt_4,val,\npt_99,val,\n")
    summary = run([cases / "a"], tmp_path / "out", splits=SplitOptions(table))
    assert members(tmp_path / "out") == {"pt_0": "train", "pt_3": "train", "pt_4": "val"}
    patients = {e.meta["patient"] for e in examples(tmp_path / "out")["train"]}
    assert patients == {"p"}
    # What is left out is counted and listed.
    assert summary["about"]["cases_without_split"] == 3
    assert summary["about"]["cases_not_found"] == 1
    missing = [row["input"] for row in read_csv(tmp_path / "out" / "missing.csv")]
    assert missing == ["pt_1", "pt_2", "pt_5", "pt_99"]
    # With shares, the cases that the table does not list are hashed.
    run([cases / "a"], tmp_path / "hashed", splits=SplitOptions(table, {"test": 1.0}))
    assert members(tmp_path / "hashed") == {
        **members(tmp_path / "out"),
        **dict.fromkeys(("pt_1", "pt_2", "pt_5"), "test"),
    }


def test_a_patient_in_two_splits_is_refused(cases, tmp_path):
    table = tmp_path / "splits.csv"
    table.write_text("case,split,patient\npt_0,train,p\npt_3,val,p\n")
    with pytest.raises(InputError, match=r"patient p is in train.*val"):
        run([cases / "a"], tmp_path / "out", splits=SplitOptions(table))
    with pytest.raises(InputError, match="case pt_0 is in two folders"):
        run([f"train={cases / 'a'}", f"val={cases / 'a'}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_meta_csv_is_used_unless_shares_are_given(tmp_path):
    for name in ("s1", "s2"):
        organ_cases.write_case(tmp_path / "ts" / name, {"liver": [20] * 12})
    (tmp_path / "ts" / "meta.csv").write_text("image_id;age;split\ns1;50;train\ns2;60;hand\n")
    run([tmp_path / "ts"], tmp_path / "meta")
    assert members(tmp_path / "meta") == {"s1": "train", "s2": "hand"}
    run([tmp_path / "ts"], tmp_path / "hash", splits=SplitOptions(shares={"test": 1.0}))
    assert set(members(tmp_path / "hash").values()) == {"test"}


def content(out):
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and "log" not in path.name)
    return {
        str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in files
    }


def test_any_number_of_workers_and_a_resumed_run_write_the_same_bytes(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_RECORDS", 24)
    options = {"rules": Rules(every=1), "splits": SplitOptions(shares=HALF, seed=4)}
    run([cases / "a"], tmp_path / "one", **options)
    assert multiprocessing.parent_process() is None
    run([cases / "a"], tmp_path / "two", workers=2, **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    calls = itertools.count()
    original = segmentations.make_case

    def stop(unit):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return original(unit)

    with monkeypatch.context() as patch:
        patch.setattr(segmentations, "make_case", stop)
        with pytest.raises(KeyboardInterrupt):
            run([cases / "a"], tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed" / "dataset.json").exists()
    with pytest.raises(InputError, match="with plan "):
        run([cases / "a"], tmp_path / "resumed", **options | {"rules": Rules(every=2)})
    run([cases / "a"], tmp_path / "resumed", **options)
    assert content(tmp_path / "one") == content(tmp_path / "resumed")


def test_the_command(cases, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text("mask,label\nliver,belly\ncord,back\nspleen,belly\n")
    arguments = ["prepare", "segmentations", cases / "a", f"test={cases / 'b'}"]
    arguments += ["--labels", labels, "--every", 3, "--min-area", 0, "--size", 32, "--workers", 1]
    arguments += ["--unknown-below", "back", "--shares", "train=0.5,val=0.5", "--seed", 4]
    arguments += ["--source", "Ours: neck", "--out", tmp_path / "out"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    out = capsys.readouterr().out
    assert "belly" in out and "unknown" in out and "contact_sheet.png" in out
    assert "masks of --labels that no case has: spleen" in out
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [label["name"] for label in info["labels"]] == ["belly", "back"]
    assert info["about"]["masks"] == {"belly": ["liver", "spleen"], "back": ["cord"]}
    assert info["about"]["masks_without_case"] == ["spleen"]
    assert info["about"]["rules"]["min_area_mm2"] == 0.0
    assert info["splits"]["test"]["count"] == 2 * 4


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--shares", "train=0.5"], "sum of 1"),
        (["--shares", "train"], "SPLIT=SHARE"),
        (["--unknown-below", "spleen"], "spleen is not a label"),
        (["--min-area", "-1"], "--min-area"),
        (["--splits", "absent.csv"], "absent.csv"),
        (["--splits", ""], "not a file"),  # an unset variable of a shell must not mean a hash
        (["--labels", "absent.csv"], "absent.csv"),
        (["--size", "33"], "--size 33"),
    ],
)
def test_bad_arguments_are_one_line_with_exit_code_2(cases, tmp_path, capsys, options, part):
    arguments = ["prepare", "segmentations", str(cases / "a"), "--out", str(tmp_path / "out")]
    try:
        code = cli.main([*arguments, *options])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and part in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rejected_cases_are_listed_with_exit_code_3(cases, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for path in (cases / "a").iterdir():
        (tmp_path / "in" / path.name).symlink_to(path)
    folder = organ_cases.write_case(tmp_path / "in" / "pt_x", {"liver": [9] * 12})
    mask = organ_cases.organ([9] * 12).astype(np.uint8)
    path = organ_cases.write_nifti(folder / "segmentations" / "cord.nii.gz", mask, shift=9.0)
    arguments = ["prepare", "segmentations", tmp_path / "in", "--out", tmp_path / "out"]
    arguments += ["--size", 32, "--workers", 1, "--shares", "train=1"]
    assert cli.main([str(argument) for argument in arguments]) == 3
    assert "rejected: 1" in capsys.readouterr().out
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert failure["input"] == str(folder / "ct.nii.gz") and str(path) in failure["reason"]
    assert "pt_x" not in members(tmp_path / "out")
