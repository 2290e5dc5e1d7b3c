"""The OpenKBP release (sparse CSV) as NIfTI in TotalSegmentator's layout.

A patient is a folder `pt_N` of CSV files. `ct.csv` has the header `,data` and rows of index and
value; a structure such as `Brainstem.csv` has the same header and rows of an index and an empty
cell. An index counts the voxels of a 128 x 128 x 128 array in C order, whose axes run from anterior
to posterior, from the patient's right to the left, and from head to feet; other voxels are 0.
`voxel_dimensions.csv` has three lines, mm along these axes. CT values are HU + 1024, at least 0
(Babier et al., Medical Physics 2021; github.com/ababier/open-kbp).

The release pads scans to 128 slices: leading and trailing slices with a body area below `MIN_BODY`
are removed.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import nifti, preprocess
from maknet_jax.ct.reading import one_line
from maknet_jax.errors import InputError, Rejected

SHAPE = (128, 128, 128)
OFFSET = 1024  # HU
MIN_BODY = 7000.0  # mm2
# Names of the release -> TotalSegmentator's name, if it has one. Targets (PTV) are not organs.
ORGANS = {
    "Brainstem": "brainstem",
    "SpinalCord": "spinal_cord",
    "RightParotid": "parotid_gland_right",
    "LeftParotid": "parotid_gland_left",
    "Esophagus": "esophagus",
    "Larynx": "larynx",
    "Mandible": "mandible",
}
_FILES = ("ct", "voxel_dimensions", "dose", *ORGANS)
_VALUES = (-OFFSET, np.iinfo(np.int16).max)  # of the CT: some scanners pad with -2048 HU


def prepare_openkbp(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Converts patients of the OpenKBP release to NIfTI for `prepare_segmentations`.

    Args:
      folder: a folder of `pt_N/*.csv`, such as `provided-data/train-pats`.
      out: the folder to write, in TotalSegmentator's layout; finished patients are skipped.

    Returns:
      The summary: patients, patients converted by an earlier call, and failures.

    Raises:
      InputError: `folder` has no such patients.
    """
    out = pathlib.Path(out)
    patients = find_patients(folder)
    with console.progress("prepare openkbp", len(patients)) as advance:
        present, failures = convert_all(patients, out, advance)
    console.write_failures(out / "failures.csv", failures)
    counts = {"patients": len(patients) - len(failures), "present_before": present}
    return {"out": str(out), **counts, "failures": len(failures)}


def find_patients(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The folders of a release, sorted by name.

    Raises:
      InputError: there are none with a `ct.csv`.
    """
    root = pathlib.Path(folder)
    patients = sorted({path.parent for path in root.glob("*/*.csv") if path.stem in _FILES})
    if not any((patient / "ct.csv").is_file() for patient in patients):
        raise InputError(
            f"{root} has no pt_N/ct.csv: pass a folder of OpenKBP's release such as "
            "provided-data/train-pats"
        )
    return patients


def convert_all(
    patients: Sequence[pathlib.Path], out: pathlib.Path, advance: Callable[[], None]
) -> tuple[int, list[tuple[str, str]]]:
    """Converts patients into folders of the same names in `out`; calls `advance` after each.

    Returns:
      (number of patients converted before, (patient, reason) of each that cannot be read).
    """
    present, failures = 0, []
    for patient in patients:
        try:
            present += not convert(patient, out / patient.name)
        except Rejected as error:
            failures.append((str(patient), str(error)))
        advance()
    return present, failures


def convert(patient: pathlib.Path, out: pathlib.Path) -> bool:
    """Writes `out/ct.nii.gz` and `out/segmentations/ORGAN.nii.gz` atomically.

    A structure without voxels was not contoured and becomes an empty mask; for most such structures
    the release has no file.

    Args:
      patient: the folder of CSV files.
      out: the folder to write.

    Returns:
      False if it was converted before.

    Raises:
      Rejected: a file is missing or invalid, the scan contains no body, or `out` is in use.
    """
    import nibabel  # slow to import

    if (out / "ct.nii.gz").is_file():
        return False
    if out.exists():
        raise Rejected(f"{out} exists and is not a converted patient: choose another folder")
    spacing = _read_spacing(patient / "voxel_dimensions.csv")
    indices, values = _read_sparse(patient / "ct.csv", values=True)
    hu = np.full(SHAPE, -OFFSET, np.int16)
    hu.flat[indices] = np.rint(values) - OFFSET
    body = (hu > preprocess.BODY).sum(axis=(0, 1)) * spacing[0] * spacing[1]
    inside = np.flatnonzero(body >= MIN_BODY)
    if not inside.size:
        raise Rejected(f"no slice has {MIN_BODY / 100:g} cm2 of body")
    body_slices = slice(inside[0], inside[-1] + 1)
    affine = np.diag([-spacing[1], -spacing[0], spacing[2], 1.0])
    affine[:2, 3] = [(n - 1) / 2 * mm for n, mm in zip(SHAPE, spacing[1::-1], strict=False)]

    def write(volume: np.ndarray, path: pathlib.Path) -> None:
        # [y, x, z] from the head -> [x, y, z] from the feet, as stored in NIfTI.
        stored = volume[:, :, body_slices].transpose(1, 0, 2)[:, :, ::-1]
        image = nibabel.Nifti1Image(np.ascontiguousarray(stored), affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(path)

    with files.write_folder(out) as folder:
        (folder / "segmentations").mkdir()
        write(hu, folder / "ct.nii.gz")
        for structure, organ in ORGANS.items():
            file = patient / f"{structure}.csv"
            if os.path.lexists(file):  # if it cannot be read, the structure is not merely missing
                mask = np.zeros(SHAPE, np.uint8)
                mask.flat[_read_sparse(file, values=False)[0]] = 1
                write(mask, folder / "segmentations" / f"{organ}.nii.gz")
    return True


def _read_spacing(path: pathlib.Path) -> np.ndarray:
    """Mm along y, x and z."""
    try:
        spacing = np.array(path.read_text(encoding="utf-8-sig").split(), float)
    except OSError as error:
        raise Rejected(f"{path.name}: {one_line(error)}") from None
    except ValueError:
        spacing = np.zeros(0)
    low, high = nifti.SPACING
    if spacing.shape != (3,) or not ((spacing >= low) & (spacing <= high)).all():
        raise Rejected(f"{path.name}: expected three numbers from {low} to {high} mm")
    return spacing


def _read_sparse(path: pathlib.Path, *, values: bool) -> tuple[np.ndarray, np.ndarray]:
    """The indices and values of a sparse file; without `values` the second column is empty."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline().strip()
            rows = [row for row in map(str.strip, file) if row]
        if not values:
            split = [row.partition(",") for row in rows]
            rows = [index for index, _, _ in split]
            if not {cell.strip().lower() for _, _, cell in split} <= {"", "nan"}:
                raise ValueError("expected rows of an index and an empty cell")
        columns = 2 if values else 1
        table = np.zeros((0, columns))
        if rows:
            table = np.loadtxt(rows, delimiter=",", comments=None, ndmin=2)
        if table.shape[1] != columns:
            raise ValueError("expected rows of an index and a value")
    except (OSError, ValueError) as error:
        raise Rejected(f"{path.name}: {one_line(error)}") from None
    if header != ",data":
        raise Rejected(f"{path.name} begins with {header[:40]!r}: expected ',data'")
    indices, last = table[:, 0], np.prod(SHAPE) - 1
    if not ((indices >= 0) & (indices <= last) & (indices == np.rint(indices))).all():
        raise Rejected(f"{path.name}: indices should be integers from 0 to {last}")
    if len(np.unique(indices)) < len(indices):
        raise Rejected(f"{path.name}: a voxel is listed twice")
    if values and not ((table[:, 1] >= _VALUES[0]) & (table[:, 1] <= _VALUES[1])).all():
        raise Rejected(f"{path.name}: values should be from {_VALUES[0]} to {_VALUES[1]}")
    return indices.astype(np.int64), table[:, -1]
