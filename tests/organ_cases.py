"""Small CT cases with organ masks, in the layouts of `maknet prepare segmentations`."""

import nibabel
import numpy as np

SHAPE = (12, 40, 40)  # z, y, x, head to feet
SPACING = (5.0, 2.0, 3.0)  # mm: a pixel is 6 mm2
PIXEL = 6.0


def ct(seed=0):
    """A body of soft tissue in air, int16 `[Z, Y, X]`."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[:, 6:34, 4:36] = 40 + np.random.default_rng(seed).integers(-20, 20, (12, 28, 32))
    return hu


def organ(pixels):
    """A mask with that many pixels in each slice: bool `[Z, Y, X]`."""
    mask = np.zeros(SHAPE, bool)
    for z, count in enumerate(pixels):
        mask[z].flat[500 : 500 + count] = True
    return mask


def write_nifti(path, volume, spacing=SPACING, shift=0.0, extension=None):
    """Writes `[Z, Y, X]` in the standard orientation as a NIfTI that is stored from the feet up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    z, y, x = spacing
    affine = np.diag([-x, -y, z, 1.0])
    affine[0, 3] = shift
    stored = np.ascontiguousarray(volume.transpose(2, 1, 0)[:, :, ::-1])
    image = nibabel.Nifti1Image(stored, affine)
    if extension is not None:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, extension))
    image.to_filename(path)
    return path


def write_case(folder, masks, seed=0):
    """Writes a case in TotalSegmentator's layout; `masks` are name -> pixels per slice."""
    write_nifti(folder / "ct.nii.gz", ct(seed))
    (folder / "segmentations").mkdir()
    for name, pixels in masks.items():
        mask = organ(pixels).astype(np.uint8)
        write_nifti(folder / "segmentations" / f"{name}.nii.gz", mask)
    return folder
