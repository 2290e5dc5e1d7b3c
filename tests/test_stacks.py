"""DICOM series divided into stacks: copies, mixed acquisitions, gaps and changes of spacing."""

import shutil

import numpy as np
import pytest
from test_dicom import only_reason, only_series, stored_values, write_series, write_slice

from maknet_jax.ct import search, volumes
from maknet_jax.ct.blocks import find_blocks
from maknet_jax.errors import Rejected

TILTED = [1, 0, 0, 0, 0.939693, 0.342020]


def keys(path):
    series, reasons = search.find_series(path)
    return [(ref.key, ref.count, ref.copies) for ref in series], reasons


def seeds(volume):
    """The seeds of the slices of a volume; see `write_series`."""
    planes = {stored_values(k).astype(int).tobytes(): k for k in range(30)}
    return [planes[(plane.astype(int) + 1024).tobytes()] for plane in volume.hu]


def write_two(folder, places, others, first, second):
    """Two acquisitions in one series: slices at `places`, then at `others`, with these elements."""
    folder.mkdir(exist_ok=True)
    for k, z in enumerate([*places, *others]):
        changes = first(k) if k < len(places) else second(k)
        write_slice(folder / f"{k:03d}.dcm", z=z, values=stored_values(k), **changes)


def test_copies_of_slices_are_taken_once_and_counted(tmp_path):
    write_series(tmp_path / "a", [0, 5, 10])
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    # The same pixels under another UID, and in another encoding.
    write_slice(tmp_path / "renamed.dcm", z=5, values=stored_values(1), SOPInstanceUID="9.9")
    big = {"syntax": "1.2.840.10008.1.2.2", "values": stored_values(2).astype(">i2")}
    write_slice(tmp_path / "recoded.dcm", z=10, **big)
    assert keys(tmp_path) == ([("1.2.3", 3, 5)], [])
    volume = volumes.load_series(search.find_series(tmp_path)[0][0])
    assert volume.slices == ("a/002.dcm", "a/001.dcm", "a/000.dcm") and seeds(volume) == [2, 1, 0]
    # A copy that is given alone has the neighbours of its original.
    copy, index = volumes.load_series_of(
        write_slice(tmp_path / "a" / "x.dcm", z=5, values=stored_values(1))
    )
    assert seeds(copy) == [2, 1, 0] and index == 1


def test_an_unreadable_copy_is_listed_and_the_series_stays(tmp_path):
    paths = write_series(tmp_path, [0, 5, 10])
    shutil.copy(paths[1], tmp_path / "000-copy.dcm")
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-8])
    found, reasons = keys(tmp_path)
    assert found == [("1.2.3", 3, 0)]
    assert [path for path, _ in reasons] == [str(paths[1])]
    assert seeds(volumes.load_series(search.find_series(tmp_path)[0][0])) == [2, 1, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda k: {"AcquisitionNumber": 1}, lambda k: {"AcquisitionNumber": 2}),
        (lambda k: {"TemporalPositionIdentifier": 1}, lambda k: {"TemporalPositionIdentifier": 2}),
        (lambda k: {"ConvolutionKernel": "B30f"}, lambda k: {"ConvolutionKernel": ["B70f", "3"]}),
        (lambda k: {"SliceThickness": 5}, lambda k: {"SliceThickness": 1}),
        (lambda k: {"ContentTime": "101500"}, lambda k: {"ContentTime": "101700"}),
        (lambda k: {"ContentTime": f"1015{k:02d}"}, lambda k: {"ContentTime": f"1017{k:02d}"}),
        (lambda k: {"InstanceNumber": k}, lambda k: {"InstanceNumber": k}),
    ],
    ids=["acquisition", "phase", "kernel", "thickness", "one time", "times", "numbers"],
)
def test_two_images_at_each_position_are_two_series(tmp_path, first, second):
    places = [0, 5, 10, 15]
    write_two(tmp_path, places, places, first, second)
    assert keys(tmp_path) == ([("1.2.3:1", 4, 0), ("1.2.3:2", 4, 0)], [])
    series, _ = search.find_series(tmp_path)
    assert [seeds(volumes.load_series(ref)) for ref in series] == [[3, 2, 1, 0], [7, 6, 5, 4]]
    # A slice that is given alone has the neighbours of its own acquisition.
    volume, index = volumes.load_series_of(tmp_path / "005.dcm")
    assert seeds(volume) == [6, 5, 4] and index == 1


def test_two_images_at_one_position_are_refused_if_nothing_divides_them(tmp_path):
    places = [0, 5, 10, 15]
    write_two(tmp_path, places, places, lambda k: {}, lambda k: {})
    assert "two slices at one position" in only_reason(tmp_path)
    # An acquisition with a missing slice is not whole.
    number = {"AcquisitionNumber": 2}
    write_two(
        tmp_path / "a", places, [0, 5, 15], lambda k: {"AcquisitionNumber": 1}, lambda k: number
    )
    assert "one position" in only_reason(tmp_path / "a")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
        ({"SeriesNumber": 1}, {"SeriesNumber": 2}),
        ({"PatientID": "a"}, {"PatientID": "b"}),
        ({"StudyInstanceUID": "1.2"}, {"StudyInstanceUID": "1.3"}),
        ({"FrameOfReferenceUID": "1.2"}, {"FrameOfReferenceUID": "1.3"}),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_interleaved_acquisitions_and_patients_are_divided(tmp_path, first, second):
    write_two(tmp_path, [0, 5, 10, 15], [2.5, 7.5, 12.5], lambda k: first, lambda k: second)
    assert keys(tmp_path) == ([("1.2.3:1", 4, 0), ("1.2.3:2", 3, 0)], [])
    series, _ = search.find_series(tmp_path)
    assert [seeds(volumes.load_series(ref)) for ref in series] == [[3, 2, 1, 0], [6, 5, 4]]
    assert all(volumes.load_series(ref).spacing[0] == 5 for ref in series)


def test_interleaved_passes_in_time_are_divided(tmp_path):
    times = [f"10{minute}{second:02d}" for minute in (10, 12) for second in range(4)]
    write_two(
        tmp_path,
        [0, 5, 10, 15],
        [2.5, 7.5, 12.5, 17.5],
        *[lambda k: {"AcquisitionTime": times[k]}] * 2,
    )
    assert [key for key, *_ in keys(tmp_path)[0]] == ["1.2.3:1", "1.2.3:2"]


def test_interleaved_acquisitions_that_are_not_whole_are_refused(tmp_path):
    numbers = [1, 2, 1, 2, 2, 1, 2, 1, 1, 2]
    for k, number in enumerate(numbers):
        values = stored_values(k)
        write_slice(tmp_path / f"{k}.dcm", z=5 * k, values=values, AcquisitionNumber=number)
    assert "AcquisitionNumber alternates" in only_reason(tmp_path)
    (tmp_path / "b").mkdir()
    for k in range(8):  # two acquisitions with equal numbers of slices, not evenly spaced alone
        z = [0, 2, 5, 7, 15, 17, 20, 22][k]
        write_slice(
            tmp_path / "b" / f"{k}.dcm",
            z=z,
            SeriesInstanceUID="1.9",
            values=stored_values(k),
            InstanceNumber=k // 2,
        )
    with pytest.raises(Rejected):
        volumes.load_series_of(tmp_path / "b" / "3.dcm")


def test_consecutive_patients_are_divided_and_consecutive_acquisitions_are_not(tmp_path):
    def write(name, element):
        for k in range(8):
            values = stored_values(k)
            changes = {element: str(1 + k // 4), "InstanceNumber": k % 4}
            (tmp_path / name).mkdir(exist_ok=True)
            write_slice(tmp_path / name / f"{k}.dcm", z=-5 * k, values=values, **changes)

    write("step-and-shoot", "AcquisitionNumber")
    assert keys(tmp_path / "step-and-shoot") == ([("1.2.3", 8, 0)], [])
    write("patients", "PatientID")
    assert keys(tmp_path / "patients") == ([("1.2.3:1", 4, 0), ("1.2.3:2", 4, 0)], [])
    # One slice per rotation: its acquisition number is its own.
    write_two(tmp_path / "x", range(9), [], lambda k: {"AcquisitionNumber": (k * 7) % 9}, None)
    assert keys(tmp_path / "x") == ([("1.2.3", 9, 0)], [])


def test_a_slice_of_another_matrix_is_listed_alone(tmp_path):
    write_series(tmp_path, [0, 5, 10])
    sheet = write_slice(tmp_path / "dose.dcm", z=5, values=stored_values(0, (9, 9)))
    ((ref,), (reason,)) = search.find_series(tmp_path)
    assert ref.count == 3 and reason[0] == str(sheet)
    assert "matrix" in reason[1] and "dose.dcm" in reason[1]
    sheet.unlink()
    write_slice(sheet, drop=["ImagePositionPatient"])
    ((ref,), (reason,)) = search.find_series(tmp_path)
    assert ref.count == 3 and "ImagePositionPatient" in reason[1]
    # Another reconstruction of several slices is a series of its own.
    for k in range(2):
        write_slice(tmp_path / f"fov{k}.dcm", z=5 * k, PixelSpacing=[0.3, 0.3])
    assert [key for key, *_ in keys(tmp_path)[0]] == ["1.2.3:1", "1.2.3:2"]


def test_missing_slices_divide_a_series_into_blocks(tmp_path):
    write_series(tmp_path, [0, -5, -10, -15, -25, -30, -35, -40, -45])
    volume = only_series(tmp_path)
    assert [(block.start, block.stop, block.joined) for block in volume.blocks] == [
        (0, 4, False),
        (4, 9, False),
    ]
    assert volume.spacing[0] == 5 and volume.z_mm.tolist() == [0, 5, 10, 15, 25, 30, 35, 40, 45]
    assert volume.triplets() == [(1, 5.0), (5, 5.0)]
    around = [[seeds_of(plane) for plane in volume.neighbours(k)] for k in (0, 3, 4, 5)]
    assert around == [[0, 0, 1], [2, 3, 3], [4, 4, 5], [4, 5, 6]]
    alone, index = volumes.load_series_of(tmp_path / "004.dcm")
    assert seeds(alone) == [4, 5] and index == 0


def seeds_of(plane):
    return next(k for k in range(30) if (stored_values(k).astype(int) - 1024 == plane).all())


@pytest.mark.parametrize("steps", [(4, 7), (7.5, 2.5)])
def test_a_change_of_spacing_joins_blocks(tmp_path, steps):
    gaps = [steps[0]] * 4 + [steps[1]] * 6
    write_series(tmp_path, [-float(z) for z in np.cumsum([0, *gaps])])
    volume = only_series(tmp_path)
    assert [(block.start, block.stop, block.distance, block.joined) for block in volume.blocks] == [
        (0, 5, steps[0], False),
        (5, 11, steps[1], True),
    ]
    assert np.isnan(volume.spacing[0]) and volume.spacing[1:] == (0.5, 0.75)
    np.testing.assert_allclose(volume.z_mm, np.cumsum([0, *gaps]))
    assert volume.triplets() == [(1, steps[0]), (6, steps[1]), (9, steps[1])]
    assert [seeds_of(plane) for plane in volume.neighbours(5)] == [4, 5, 6]


def test_a_lateral_jump_divides_a_series_and_a_tilted_gantry_does_not(tmp_path):
    for k in range(8):
        jumped, tilted = {"ImagePositionPatient": [-10 + 80 * (k > 3), -20, -5 * k]}, {}
        tilted = {"ImagePositionPatient": [-10, -20, -20 * k], "ImageOrientationPatient": TILTED}
        for name, changes in (("jump", jumped), ("tilt", tilted)):
            (tmp_path / name).mkdir(exist_ok=True)
            write_slice(tmp_path / name / f"{k}.dcm", values=stored_values(k), **changes)
    volume = only_series(tmp_path / "jump")
    assert [(block.start, block.joined) for block in volume.blocks] == [(0, False), (4, False)]
    assert [seeds_of(plane) for plane in volume.neighbours(4)] == [4, 4, 5]
    assert only_series(tmp_path / "tilt").blocks == ()
    for k in range(4):  # each slice is shifted
        changes = {"ImagePositionPatient": [50 * k, -20, -5 * k], "SeriesInstanceUID": "1.9"}
        write_slice(tmp_path / f"{k}.dcm", values=stored_values(k), **changes)
    assert "not aligned" in search.find_series(tmp_path)[1][0][1]


@pytest.mark.parametrize(
    ("gaps", "starts"),
    [
        ([5] * 6, [0]),
        ([5, 7, 4, 5], [0]),  # within a factor of 1.5
        ([5, 10], [0, 2]),
        ([7.5, 2.5, 2.5, 2.5], [0, 1]),
        ([4, 4, 4, 6.5, 9, 9, 9], [0, 4]),
        ([5, 5, 20, 5, 5, 20, 5], [0, 3, 6]),
        ([7.5] * 4 + [2.5] * 5 + [7.5] * 3, [0, 5, 10]),
    ],
)
def test_blocks_of_distances(gaps, starts):
    places = np.cumsum([0, *gaps])
    blocks, _ = find_blocks(places, [0] * len(gaps), ["x"] * len(places))
    assert [block.start for block in blocks] == starts
    assert [block.offset for block in blocks] == [places[start] for start in starts]


@pytest.mark.parametrize("gaps", [[5, 5, 2.5, 2.5, 5, 5], [5, 5, 5, 2], [40, 7, 60, 9, 55, 80]])
def test_irregular_distances_are_refused(gaps):
    places = np.cumsum([0, *gaps])
    with pytest.raises(Rejected, match="uneven"):
        find_blocks(places, [0] * len(gaps), [str(k) for k in range(len(places))])


@pytest.mark.parametrize(
    "kind",
    ["CT_SOM5 TOP", "CT_SOM5 MIP", "MINIP", "MIN_IP", "VRT", "SUBTRACTION", "MATERIAL_IODINE"]
    + ["LOCALIZER", "PROJECTION IMAGE", "CT_SOM5 PROT", "EFF_ATOMIC_NUM"],
)
def test_images_that_are_not_slices_of_hu_are_refused(tmp_path, kind):
    write_slice(tmp_path / "a.dcm", ImageType=["ORIGINAL", "PRIMARY", "AXIAL", kind])
    assert kind in only_reason(tmp_path)


@pytest.mark.parametrize("kind", ["CT_SOM5 SPI", "CT_SOM7 SPI DUAL", "HELIX", "MPR", "VMI", "STOP"])
def test_other_kinds_of_images_are_read(tmp_path, kind):
    write_slice(tmp_path / "a.dcm", ImageType=["DERIVED", "SECONDARY", "AXIAL", kind])
    assert only_series(tmp_path).hu.shape == (1, 6, 5)


def test_ct_image_storage_without_modality_is_ct(tmp_path):
    write_slice(tmp_path / "a.dcm", drop=["Modality"])
    assert only_series(tmp_path).hu.shape == (1, 6, 5)
