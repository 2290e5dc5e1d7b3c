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
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maknet_jax import console
from maknet_jax.ct import preprocess
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
    """The folders of a release that contain a `ct.csv`, sorted by name.

    Raises:
      InputError: there are none.
    """
    root = pathlib.Path(folder)
    patients = sorted(path.parent for path in root.glob("*/ct.csv"))
    if not patients:
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
      False if `out` exists already.

    Raises:
      Rejected: a file is missing or invalid, or the scan contains no body.
    """
    import nibabel  # slow to import

    if out.exists():
        return False
    spacing = _read_spacing(patient / "voxel_dimensions.csv")
    indices, values = _read_sparse(patient / "ct.csv", values=True)
    hu = np.full(SHAPE, -OFFSET, np.int16)
    hu.flat[indices] = np.rint(values) - OFFSET
    body = (hu > preprocess.BODY).sum(axis=(0, 1)) * spacing[0] * spacing[1]
    inside = np.flatnonzero(body >= MIN_BODY)
    if not inside.size:
        raise Rejected(f"no slice has {MIN_BODY / 100:g} cm2 of body")
    body_slices = slice(inside[0], inside[-1] + 1)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "segmentations").mkdir(parents=True)
    affine = np.diag([-spacing[1], -spacing[0], spacing[2], 1.0])
    affine[:2, 3] = [(n - 1) / 2 * mm for n, mm in zip(SHAPE, spacing[1::-1], strict=False)]

    def write(volume: np.ndarray, name: str) -> None:
        # [y, x, z] from the head -> [x, y, z] from the feet, as stored in NIfTI.
        stored = volume[:, :, body_slices].transpose(1, 0, 2)[:, :, ::-1]
        image = nibabel.Nifti1Image(np.ascontiguousarray(stored), affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(temporary / name)

    write(hu, "ct.nii.gz")
    for structure, organ in ORGANS.items():
        file = patient / f"{structure}.csv"
        if file.is_file():
            mask = np.zeros(SHAPE, np.uint8)
            mask.flat[_read_sparse(file, values=False)[0]] = 1
            write(mask, f"segmentations/{organ}.nii.gz")
    os.replace(temporary, out)
    return True


def _read_spacing(path: pathlib.Path) -> np.ndarray:
    """Mm along y, x and z."""
    try:
        spacing = np.loadtxt(path)
    except (OSError, ValueError) as error:
        raise Rejected(f"{path.name}: {one_line(error)}") from None
    if spacing.shape != (3,) or not ((spacing > 0) & (spacing < np.inf)).all():
        raise Rejected(f"{path.name}: expected three positive numbers in mm")
    return spacing


def _read_sparse(path: pathlib.Path, *, values: bool) -> tuple[np.ndarray, np.ndarray]:
    """The indices and values of a sparse file; without `values` the second column is empty."""
    columns = (0, 1) if values else (0,)
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().strip()
            rows = file.readlines()
        table = np.loadtxt(rows, delimiter=",", usecols=columns, ndmin=2) if rows else None
    except (OSError, ValueError) as error:
        raise Rejected(f"{path.name}: {one_line(error)}") from None
    if header != ",data":
        raise Rejected(f"{path.name} begins with {header[:40]!r}: expected ',data'")
    if table is None:
        table = np.zeros((0, 2))
    indices = table[:, 0].astype(np.int64)
    inside = (indices >= 0) & (indices < np.prod(SHAPE))
    if not (inside & (indices == table[:, 0])).all():
        raise Rejected(f"{path.name}: indices should be integers from 0 to {np.prod(SHAPE) - 1}")
    return indices, table[:, -1]
