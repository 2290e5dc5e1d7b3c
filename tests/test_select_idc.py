"""`maknet select idc`: a small index of the same schema, and with `make test-all` the real one."""

import collections
import importlib.metadata
import json
import sys

import duckdb
import pytest
from prepared import read_csv

from maknet_jax import cli, select_idc
from maknet_jax.data import idc
from maknet_jax.data.idc_selection import Filters
from maknet_jax.errors import InputError

ANALYSIS = "totalsegmentator_ct_segmentations"
CT_IMAGE, SECONDARY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
DEFAULTS = {
    "analysis_result_id": None,
    "Modality": "CT",
    "SOPClassUID": CT_IMAGE,
    "TransferSyntaxUID": "1.2.840.10008.1.2.1",
    "BodyPartExamined": "CHEST",
    "SeriesNumber": "2",
    "SeriesDescription": None,
    "instanceCount": 100,
    "license_short_name": "CC BY 4.0",
    "source_DOI": "10.1/ct",
    "series_size_MB": 50.0,
}


def series(uid, collection="nlst", patient=None, study=None, **values):
    """One row of the index; by default every series has its own patient and study."""
    row = {"SeriesInstanceUID": uid, "collection_id": collection}
    row |= {"PatientID": patient or f"p-{uid}", "StudyInstanceUID": study or f"s-{uid}"}
    row["series_aws_url"] = f"s3://idc-open-data/{uid}/*"
    return row | DEFAULTS | values


def seg(uid, study, number, **values):
    text = f"TotalSegmentator(v1.5.6) Segmentation of Series {number}" if number else None
    values = {"Modality": "SEG", "analysis_result_id": ANALYSIS, "instanceCount": 1} | values
    values |= {"SeriesDescription": text, "source_DOI": "10.1/seg", "series_size_MB": 8.0}
    return series(uid, study=study, **values)


# Series of 100 slices of the same licence and body part, unless stated.
ROWS = [
    *(series(f"a{k}", patient="pa") for k in range(3)),
    series("b0", patient="pb", BodyPartExamined="ABDOMEN"),
    series("b1", patient="pb", BodyPartExamined="CHESTABDPELVIS", license_short_name="CC BY 3.0"),
    series("c0", "other", patient="pa", BodyPartExamined=None),  # "pa" is someone else there
    series("c1", "other", license_short_name="CC BY-NC 4.0"),
    series("short", instanceCount=50),
    series("scanned", SOPClassUID=SECONDARY),
    series("lossy", TransferSyntaxUID="1.2.840.10008.1.2,1.2.840.10008.1.2.4.51"),
    series("water", "some_phantom_study"),
    series("mouse", "uw_mice"),
    # Study x: two series, each with its segmentation; study y: two with the same number.
    series("x2", patient="px", study="x"),
    series("x3", patient="px", study="x", SeriesNumber="3", BodyPartExamined="HEAD"),
    seg("seg-x2", "x", 2, patient="px"),
    seg("seg-x3", "x", 3, patient="px"),
    series("y1", patient="py", study="y"),
    series("y2", patient="py", study="y"),
    seg("seg-y", "y", 2, patient="py"),
    # Study z: the number names no series. Study w: no number, and one long series.
    series("z", patient="pz", study="z", SeriesNumber="3"),
    seg("seg-z", "z", 2, patient="pz"),
    series("w", patient="pw", study="w"),
    series("w-scout", patient="pw", study="w", instanceCount=2),
    seg("seg-w", "w", None, patient="pw"),
]


def write_parquet(path, rows):
    types = {int: "BIGINT", float: "DOUBLE"}
    columns = ", ".join(f'"{name}" {types.get(type(v), "VARCHAR")}' for name, v in rows[0].items())
    with duckdb.connect() as database:
        database.execute(f"CREATE TABLE rows ({columns})")
        marks = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT INTO rows VALUES ({marks})", [[*r.values()] for r in rows])
        database.execute(f"COPY rows TO '{path}' (FORMAT parquet)")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idc")
    species = {"nlst": "Human", "other": "Human, Mouse", "uw_mice": "Mouse"}
    rows = [{"collection_id": name, "species": value} for name, value in species.items()]
    write_parquet(folder / "collections_index.parquet", rows)
    return write_parquet(folder / "idc_index.parquet", ROWS)


def selected(index, **filters):
    """The UIDs of the selected CT series in their order."""
    out = index.parent / "selection"
    summary = select_idc.select_idc(out, index=index, filters=Filters(**filters), overwrite=True)
    rows = read_csv(out / "series.csv")
    assert summary["selected"]["series"] == len(rows)
    total = sum(row["Modality"] == "CT" for row in ROWS)
    assert len(rows) + sum(summary["left_out"].values()) == total, "every series is counted once"
    return [row["series"] for row in rows]


def test_only_ct_that_can_be_prepared_and_used_by_anyone_is_selected(index):
    uids = set(selected(index))
    assert {row["SeriesInstanceUID"] for row in ROWS if row["Modality"] == "CT"} - uids == {
        *("short", "scanned", "lossy", "water", "mouse", "c1", "w-scout")
    }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"body_parts": ("abdomen", "head")}, {"b0", "x3"}),
        ({"body_parts": ("*abd*",)}, {"b0", "b1"}),
        ({"body_parts": ("unspecified",)}, {"c0"}),
        ({"collections": ("OTHER",)}, {"c0"}),
        ({"collections": ("other",), "licences": ("CC BY", "CC BY-NC")}, {"c0", "c1"}),
        ({"licences": ("CC BY 3.0",)}, {"b1"}),
        ({"licences": ("CC BY-NC",)}, {"c1"}),
        ({"exclude_collections": ("nl*",)}, {"c0"}),
        ({"exclude_collections": ("nlst",), "phantoms": True}, {"c0", "water", "mouse"}),
        ({"min_slices": 101, "phantoms": True}, None),
    ],
)
def test_filters(index, filters, expected):
    if expected is None:
        with pytest.raises(InputError, match="'fewer than 101 slices'"):
            selected(index, **filters)
    else:
        assert set(selected(index, **filters)) == expected


def test_limits_take_a_part_of_the_larger_selection_and_new_patients_first(index):
    everything = selected(index)
    assert selected(index, total=5) == everything[:5]
    assert selected(index, seed=1) != everything and set(selected(index, seed=1)) == set(everything)
    owners = {r["SeriesInstanceUID"]: (r["collection_id"], r["PatientID"]) for r in ROWS}
    patients = [owners[uid] for uid in everything]
    count = len(set(patients))
    assert len(set(patients[:count])) == count, "all patients come before any comes again"
    once = selected(index, per_patient=1)
    assert once == everything[:count]
    twice = collections.Counter(owners[uid] for uid in selected(index, per_patient=2))
    assert twice["nlst", "pa"] == 2 and twice["other", "pa"] == 1
    of_collection = collections.Counter(
        owners[uid][0] for uid in selected(index, per_collection=3, phantoms=True)
    )
    assert of_collection == {"nlst": 3, "other": 1, "some_phantom_study": 1, "uw_mice": 1}


def pairs(index, out, **options):
    summary = select_idc.select_idc(out, index=index, analysis=ANALYSIS, **options)
    rows = read_csv(out / "series.csv")
    ct = {row["series"] for row in rows if row["modality"] == "CT"}
    segments = {row["series"]: row["segments"] for row in rows if row["modality"] == "SEG"}
    assert ct == set(segments.values()) and summary["selected"]["series"] == len(ct)
    assert summary["segmentations"]["series"] == len(segments)
    left_out = sum(summary["segmentations_left_out"].values())
    return segments, left_out


def test_segmentations_are_paired_by_series_number_or_a_single_long_series(index, tmp_path):
    segments, left_out = pairs(index, tmp_path / "all")
    assert segments == {"seg-x2": "x2", "seg-x3": "x3", "seg-w": "w"} and left_out == 2
    # The other series of the study is not a candidate because of its body part.
    segments, _ = pairs(index, tmp_path / "head", filters=Filters(body_parts=("HEAD",)))
    assert segments == {"seg-x3": "x3"}


def test_a_segmentation_index_states_the_pairs(index, tmp_path):
    stated = {"seg-x2": "x3", "seg-y": "y2", "seg-z": "absent", "seg-w": None}
    rows = [{"SeriesInstanceUID": a, "segmented_SeriesInstanceUID": b} for a, b in stated.items()]
    file = write_parquet(tmp_path / "seg_index.parquet", rows)
    segments, left_out = pairs(index, tmp_path / "out", seg_index=file)
    assert segments == {"seg-x2": "x3", "seg-y": "y2"} and left_out == 3


def test_the_command_writes_a_manifest_tables_and_the_size(index, tmp_path, capsys):
    out = tmp_path / "selection"
    argv = ["select", "idc", "--index", str(index), "--with", ANALYSIS, "--out", str(out)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "6,568" in printed and "3,653" in printed and str(out / "manifest.s5cmd") in printed
    lines = (out / "manifest.s5cmd").read_text().splitlines()
    urls = {line.split()[1] for line in lines if not line.startswith("#")}
    assert urls == {row["url"] for row in read_csv(out / "series.csv")}
    assert all(line.split()[0] in ("cp", "#") for line in lines) and len(urls) == 6
    citations = {row["doi"]: row for row in read_csv(out / "citations.csv")}
    assert [citations[doi]["series"] for doi in ("10.1/ct", "10.1/seg")] == ["3", "3"]
    assert citations["10.1/ct"]["licence"] == "CC BY 4.0"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gigabytes"] == pytest.approx(0.174) and summary["selected"]["patients"] == 2

    foreign = out / "notes.txt"
    assert cli.main(argv) == 2, "a selection is never overwritten"
    assert cli.main([*argv, "--overwrite", "--max=1"]) == 0
    assert len(read_csv(out / "series.csv")) == 2
    foreign.write_text("mine")
    assert cli.main([*argv, "--overwrite"]) == 2 and foreign.read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--body-parts", "CHETS"], "CHEST"),
        (["--collections", "nslt"], "nlst"),
        (["--exclude-collections", "nslt"], "nlst"),
        (["--licences", "GPL"], "CC BY-NC 4.0"),
        (["--with", "totalsegmentator"], ANALYSIS),
        (["--seg-index", "seg.parquet"], "--with"),
        (["--index", "absent.parquet"], "absent.parquet"),
        (["--index", __file__], "is not an index"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(index, argv, part, capsys, tmp_path):
    argv = ["select", "idc", "--index", str(index), "--out", str(tmp_path / "out"), *argv]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["idc_index_data", "duckdb"])
def test_without_the_extra_the_error_names_it(package, monkeypatch, index):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"maknet-jax\[idc\]"):
        idc.read_index(idc.find_index(index if package == "duckdb" else None)[0])


@pytest.mark.slow
def test_the_real_index(tmp_path):
    summary = select_idc.select_idc(tmp_path / "pairs", analysis=ANALYSIS)
    series, patients = (summary["selected"][name] for name in ("series", "patients"))
    left_out = sum(summary["segmentations_left_out"].values())
    if importlib.metadata.version("idc-index-data") == "25.0.5":
        assert (series, patients, left_out) == (120_372, 25_438, 5_679)
    assert series > 100_000 and set(summary["licences"]) <= {"CC BY 3.0", "CC BY 4.0"}

    filters = Filters(per_collection=20, total=600)
    summary = select_idc.select_idc(tmp_path / "ct", filters=filters)
    rows = read_csv(tmp_path / "ct" / "series.csv")
    assert len(rows) == 600 and len({row["collection"] for row in rows}) > 30
    # The downloader accepts the manifest and arrives at the same size.
    from idc_index import IDCClient

    size, *_ = IDCClient()._validate_update_manifest_and_get_download_size(
        str(tmp_path / "ct" / "manifest.s5cmd"),
        str(tmp_path),
        validate_manifest=True,
        use_s5cmd_sync=False,
        dirTemplate=IDCClient.DOWNLOAD_HIERARCHY_DEFAULT,
    )
    assert size == pytest.approx(1000 * summary["gigabytes"], abs=1)
