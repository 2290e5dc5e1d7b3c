"""`maknet prepare dicom`: triplets of unlabelled volumes with pseudonymous ids."""

import hashlib
import hmac
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from prepared import examples, read_csv
from test_containers import pack
from test_dicom import write_series, write_slice
from test_search import write_pngs

from maknet_jax import prepare
from maknet_jax.ct import search
from maknet_jax.data import processes, series_search, triplets
from maknet_jax.errors import InputError


@pytest.fixture
def salt(tmp_path):
    path = tmp_path / "salt"
    path.write_text("a secret of the user, long enough\n")
    return path


@pytest.fixture(autouse=True)
def no_job_is_small(monkeypatch):
    """So that two workers are two processes."""
    monkeypatch.setattr(series_search, "is_small", lambda series: False)


def of_dicom(folder, out, salt, **options):
    options = {"min_slices": 3, "size": 32} | options
    return prepare.prepare_dicom(folder, out, salt_file=salt, **options)


def test_a_real_series_becomes_triplets_without_overlap(shared_data, salt, tmp_path):
    summary = of_dicom(shared_data / "dicom" / "liver_j2k_20", tmp_path / "out", salt)
    written = examples(tmp_path / "out")["unlabelled"]
    assert summary["records"] == {"unlabelled": 6} == {"unlabelled": len(written)}
    assert summary["counters"] == {"slices left over": 2}
    assert [e.meta["slice"] for e in written] == [1, 4, 7, 10, 13, 16]
    assert all(e.meta["slices"] == 20 and e.labels.shape == (0,) for e in written)
    # 3 mm thick, 2 mm apart.
    assert written[0].meta["spacing"] == pytest.approx([2.0, *written[0].meta["spacing"][1:]])
    assert summary["failures"] == 0


def test_a_real_nifti_torso_gives_37_triplets(shared_data, salt, tmp_path):
    path = shared_data / "nifti" / "torso_112" / "example_ct.nii.gz"
    summary = of_dicom(path, tmp_path / "out", salt, min_slices=51)
    written = examples(tmp_path / "out")["unlabelled"]
    assert summary["records"] == {"unlabelled": 37} and len(written) == 37
    assert summary["counters"] == {"slices left over": 1}
    assert len({e.id for e in written}) == 37
    # From head to feet: the last triplets show thighs and no lung.
    assert (written[0].image < -700).mean() > (written[-1].image < -700).mean()


def test_copies_of_slices_are_taken_once_and_a_gap_is_the_reason(shared_data, salt, tmp_path):
    folder = shared_data / "dicom" / "duplicate_positions"
    with pytest.raises(InputError, match=r"duplicate_positions: 1 rejected file or series: "):
        of_dicom(folder, tmp_path / "out", salt)
    both = tmp_path / "both"
    both.mkdir()
    (both / "bad").symlink_to(folder)
    for path in (shared_data / "dicom" / "liver_j2k_20").iterdir():
        (both / path.name).symlink_to(path)
    for path in folder.iterdir():
        (both / f"bad_{path.name}").symlink_to(path)
    summary = of_dicom(both, tmp_path / "out", salt)
    assert summary["records"] == {"unlabelled": 6} and summary["failures"] == 1
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    # CT26 and CT28 have one position and equal pixels; what remains has a gap.
    assert "CT24" in failure["reason"] and "CT29" in failure["reason"]
    assert "12 copies" in failure["reason"]
    assert summary["about"]["series_unreadable"] == 1


def test_triplets_do_not_span_a_missing_slice_and_copies_are_counted(salt, tmp_path):
    values = np.random.default_rng(0).integers(0, 1500, (9, 40, 40)).astype("<i2")
    (tmp_path / "in" / "a").mkdir(parents=True)
    for k in set(range(9)) - {4}:
        write_slice(tmp_path / "in" / "a" / f"{k}.dcm", z=-5 * k, values=values[k])
    shutil.copytree(tmp_path / "in" / "a", tmp_path / "in" / "b")
    summary = of_dicom(tmp_path / "in", tmp_path / "out", salt)
    written = examples(tmp_path / "out")["unlabelled"]
    assert [e.meta["slice"] for e in written] == [1, 5]  # slices 0 to 3, and 5 to 8
    assert all(e.meta["spacing"] == [5.0, 0.5, 0.75] for e in written)
    assert summary["about"]["copies_of_slices"] == 8 and summary["failures"] == 0
    assert summary["counters"] == {"slices left over": 2}
    assert "copies of slices: 8" in prepare.describe(summary)


def test_small_volumes_are_dropped_and_counted(phantom, salt, tmp_path):
    # The phantom's series have 12 and 8 slices.
    summary = of_dicom(phantom["dicom"], tmp_path / "out", salt, min_slices=9)
    assert summary["about"] == {
        "series": 1,
        "min_slices": 9,
        "series_too_small": 1,
        "series_unreadable": 0,
        "copies_of_slices": 0,
    }
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert re.search(r"\b8 slices.*--min-slices.*\b9\b", failure["reason"])
    assert summary["records"] == {"unlabelled": 4} and "series too small: 1" in prepare.describe(
        summary
    )
    with pytest.raises(InputError, match=r": 2 series of fewer than 51 slices \(--min-slices\): "):
        of_dicom(phantom["dicom"], tmp_path / "none", salt, min_slices=51)


def everything_in(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_ids_are_keyed_digests_and_the_salt_is_not_stored(phantom, salt, tmp_path):
    of_dicom(phantom["dicom"], tmp_path / "out", salt)
    written = examples(tmp_path / "out")["unlabelled"]
    ids = [e.id for e in written]
    headers = [
        pydicom.dcmread(path, stop_before_pixels=True) for path in phantom["dicom"].rglob("*.dcm")
    ]

    def digest(uid):
        secret = salt.read_text().strip().encode()
        return hmac.new(secret, str(uid).encode(), hashlib.sha256).hexdigest()[:16]

    possible = {f"{digest(h.SeriesInstanceUID)}-{digest(h.SOPInstanceUID)}" for h in headers}
    assert set(ids) <= possible and len(set(ids)) == len(ids) == 6
    assert all(e.meta["series"] == e.id.split("-")[0] for e in written)
    # The data set contains neither the salt nor a UID, a patient or a path.
    payloads = b"".join(repr(e.meta).encode() + e.id.encode() for e in written)
    content = everything_in(tmp_path / "out") + payloads
    assert salt.read_text().strip().encode() not in content
    for header in headers:
        assert str(header.SOPInstanceUID).encode() not in content
        assert str(header.PatientID).encode() not in payloads
    assert str(phantom["dicom"]).encode() not in content

    of_dicom(phantom["dicom"], tmp_path / "again", salt)
    assert [e.id for e in examples(tmp_path / "again")["unlabelled"]] == ids
    salt.write_text("quite another secret of the user\n")
    of_dicom(phantom["dicom"], tmp_path / "other", salt)
    other = [e.id for e in examples(tmp_path / "other")["unlabelled"]]
    assert not set(other) & set(ids)
    assert not {i.split("-")[0] for i in other} & {i.split("-")[0] for i in ids}


def test_a_salt_is_created_once_private_and_reused(phantom, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("one", "two"):
        of_dicom(phantom["dicom"], tmp_path / name, None)
    path = tmp_path / "config" / "maknet" / "salt"
    assert len(path.read_text().strip()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    one, two = (examples(tmp_path / name)["unlabelled"] for name in ("one", "two"))
    assert [e.id for e in one] == [e.id for e in two]
    path.write_text("short\n")
    with pytest.raises(InputError, match=r"\b5 .*\b16\b"):
        of_dicom(phantom["dicom"], tmp_path / "three", None)


def test_names_that_are_not_utf8_or_control_the_terminal_are_escaped(salt, tmp_path):
    folder = tmp_path / os.fsdecode(b"M\xfcller\x1b[2J")
    write_series(folder, [0, 5, 10])
    (folder / "=1+1.dcm").write_bytes(b"x")
    values = np.arange(-1000, -1000 + 4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(folder / "v.nii")
    summary = of_dicom(tmp_path, tmp_path / "out", salt, workers=2)
    assert summary["records"] == {"unlabelled": 2} and summary["failures"] == 1
    for path in (tmp_path / "out").glob("*.[cj]s*"):
        content = path.read_text(encoding="utf-8")
        assert "\x1b" not in content and "\udcfc" not in content
    ((failure),) = read_csv(tmp_path / "out" / "failures.csv")
    assert failure["input"].endswith(r"M\xfcller\x1b[2J/=1+1.dcm")


def test_without_a_usable_series_all_reasons_are_listed(salt, tmp_path):
    (tmp_path / "in").mkdir()
    write_series(tmp_path / "in" / "short", [0, 5, 10])
    for k in range(2):
        write_slice(tmp_path / "in" / f"mr{k}", Modality="MR", SeriesInstanceUID=f"1.2.{k}")
    with pytest.raises(InputError) as caught:
        of_dicom(tmp_path / "in", tmp_path / "out", salt, min_slices=51)
    message = str(caught.value)
    for part in (
        "1 series of fewer than 51",
        "2 rejected files",
        "--min-slices",
        "MR",
        "(2 inputs)",
        "out/failures.csv",
    ):
        assert part in message
    rows = read_csv(tmp_path / "out" / "failures.csv")
    assert len(rows) == 3
    # The folder may be used again.
    assert of_dicom(tmp_path / "in", tmp_path / "out", salt)["records"] == {"unlabelled": 1}


def test_other_files_and_single_slices_are_reasons(salt, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.pdf", "b.PDF", "c\x1b[2J"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"3 other files \(2 \.pdf, 1 no suffix\)"):
        of_dicom(tmp_path / "in", tmp_path / "out", salt)
    write_series(tmp_path / "in", [0, 5])
    with pytest.raises(InputError, match="no three consecutive slices among 2"):
        of_dicom(tmp_path / "in", tmp_path / "out", salt, min_slices=1)
    assert len(read_csv(tmp_path / "out" / "failures.csv")) == 1


def test_advice_names_options_of_this_command_only(salt, tmp_path):
    write_series(tmp_path / "in", [0, 5, 10])
    write_pngs(tmp_path / "in", ["1.png", "2.png", "3.png"])
    for path in (tmp_path / "in").glob("*.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    of_dicom(tmp_path / "in", tmp_path / "out", salt)
    (failure,) = read_csv(tmp_path / "out" / "failures.csv")
    assert "8-bit PNG" in failure["reason"] and "--png-window" not in failure["reason"]


def test_archives_and_folders_give_the_same_records(phantom, salt, tmp_path):
    files = {
        path.relative_to(phantom["dicom"]).as_posix(): path.read_bytes()
        for path in sorted(phantom["dicom"].rglob("*.dcm"))
    }
    expected = of_dicom(phantom["dicom"], tmp_path / "folder", salt)
    for ending in (".zip", ".tar.gz"):
        out = tmp_path / f"out{ending}"
        of_dicom(pack(tmp_path / f"a{ending}", files), out, salt, workers=2)
        got = {e.id: e.image.tobytes() for e in examples(out)["unlabelled"]}
        assert got == {e.id: e.image.tobytes() for e in examples(tmp_path / "folder")["unlabelled"]}
    assert expected["failures"] == 0


def test_without_a_home_folder_the_salt_file_must_be_named(phantom, salt, tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    def unknown(_):
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(InputError, match="--salt-file"):
        of_dicom(phantom["dicom"], tmp_path / "none", None)
    of_dicom(phantom["dicom"], tmp_path / "out", salt)


def test_a_full_disk_ends_in_one_line_and_the_command_can_be_repeated(phantom, salt, tmp_path):
    of_dicom(phantom["dicom"], tmp_path / "expected", salt)
    command = "import resource, sys; from maknet_jax import cli\n"
    command += "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))\n"
    command += "sys.exit(cli.main(sys.argv[2:]))"
    arguments = ["prepare", "dicom", phantom["dicom"], "--out", tmp_path / "out", "--salt-file"]
    arguments += [salt, "--min-slices", "3", "--size", "32", "--workers", "1"]
    for limit in (50, 4000):  # while the plan is written, and a shard
        ran = subprocess.run(
            [sys.executable, "-c", command, str(limit), *map(str, arguments)],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2, ran.stderr
        assert re.fullmatch(r"maknet: .*/out/\S+: File too large\n", ran.stderr), ran.stderr
    of_dicom(phantom["dicom"], tmp_path / "out", salt)
    for name in ("dataset.json", "summary.json", "contact_sheet.png"):
        assert (tmp_path / "out" / name).is_file()
    assert everything_of_shards(tmp_path / "out") == everything_of_shards(tmp_path / "expected")


def everything_of_shards(out):
    return {path.name: path.read_bytes() for path in out.rglob("*.array_record")}


@pytest.fixture
def long_series(tmp_path, monkeypatch):
    """The files of a series with two missing slices and a change of spacing, in short pieces."""
    monkeypatch.setattr(triplets, "PIECE", 2)
    values = np.random.default_rng(0).integers(0, 1500, (26, 40, 40)).astype("<i2")
    (tmp_path / "in").mkdir()
    return [
        write_slice(
            tmp_path / "in" / f"{k:02d}.dcm",
            z=-5 * k - 7 * max(0, k - 19),
            values=values[k],
        )
        for k in sorted(set(range(26)) - {7, 12})
    ]


def outputs(out, *dropped):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", "summary.json", *dropped)
    }


def test_pieces_of_a_long_series_give_the_bytes_of_the_whole(long_series, salt, tmp_path):
    counts = []
    for workers, piece in ((1, 100), (1, 2), (2, 2), (2, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triplets, "PIECE", piece)
            ref = search.find_series(tmp_path / "in")[0][0]
            (unit,) = triplets.plan_series([ref], "salt", 32)
            counts.append([part.ref.count for part in triplets.series_pieces(unit)])
            out = tmp_path / f"out{len(counts)}"
            summary = of_dicom(tmp_path / "in", out, salt, workers=workers)
            assert summary["records"] == {"unlabelled": 7}
            assert summary["counters"] == {"slices left over": 3}
        assert outputs(out) == outputs(tmp_path / "out1")
    assert counts == [[24], [6, 8, 7, 3], [6, 8, 7, 3], [3, 3, 4, 4, 3, 4, 3]]
    # No triplet spans the gaps before slices 7 and 11, or the change of spacing at slice 18.
    metas = [example.meta for example in examples(out)["unlabelled"]]
    assert [(meta["slice"], meta["spacing"][0]) for meta in metas] == [
        *((k, 5) for k in (1, 4, 8, 12, 15)),
        *((k, 12) for k in (19, 22)),
    ]


@pytest.mark.parametrize(("small", "ready"), [(True, False), (True, True), (False, False)])
def test_a_small_job_waits_for_no_worker(long_series, salt, tmp_path, monkeypatch, small, ready):
    used = []
    send = processes.Processes.send
    monkeypatch.setattr(processes.Processes, "send", lambda *args: used.append(1) or send(*args))
    monkeypatch.setattr(processes.Processes, "is_ready", lambda pool: ready)
    monkeypatch.setattr(series_search, "is_small", lambda series: small)
    of_dicom(tmp_path / "in", tmp_path / "out", salt, workers=2)
    assert bool(used) == (ready or not small)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", ["truncated", "units"])
def test_pieces_reject_what_the_whole_series_would_be_rejected_for(
    long_series, salt, tmp_path, fault, workers
):
    if fault == "truncated":
        for path in (long_series[17], long_series[9]):
            path.write_bytes(path.read_bytes()[:-50])
    else:
        for path in long_series:
            data = pydicom.dcmread(path)
            data.RescaleIntercept = 0  # none is below 0
            data.save_as(path)
    reasons = []
    for piece in (100, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triplets, "PIECE", piece)
            with pytest.raises(InputError):
                of_dicom(tmp_path / "in", tmp_path / f"out{piece}", salt, workers=workers)
        reasons.append(read_csv(tmp_path / f"out{piece}" / "failures.csv"))
    assert reasons[0] == reasons[1] and len(reasons[0]) == 1
    assert reasons[0][0]["input"] == str(long_series[0])
    assert ("10.dcm" if fault == "truncated" else "not HU") in reasons[0][0]["reason"]


def test_a_file_that_changes_between_search_and_reading_rejects_its_series(
    long_series, salt, tmp_path, monkeypatch
):
    found = search.find_series(tmp_path / "in")
    one, other = long_series[4].read_bytes(), long_series[5].read_bytes()
    long_series[4].write_bytes(other)
    long_series[5].write_bytes(one)
    monkeypatch.setattr(search, "find_series", lambda *_, **__: found)
    with pytest.raises(InputError, match="changed since"):
        of_dicom(tmp_path / "in", tmp_path / "out", salt)
