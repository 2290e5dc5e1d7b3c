"""Arrays that are not a CT volume, or have no usable geometry."""

import nibabel
import numpy as np
import pytest

from maknet_jax.ct import arrays
from maknet_jax.errors import InputError

HU = np.tile(np.arange(-1000, 0, 50, dtype=np.int16), (4, 8, 1))


@pytest.mark.parametrize(
    "array, geometry, message",
    [
        (HU, {}, "with no geometry: pass affine=.*orientation="),
        (HU, {"spacing": (1, 1, 1)}, "with spacing: pass affine"),
        (HU, {"orientation": "LPS"}, "with orientation: pass affine"),
        (HU, {"affine": np.eye(4), "spacing": (1, 1, 1)}, "with affine and spacing: pass"),
        (HU, {"affine": np.eye(3)}, r"affine of shape \(3, 3\)"),
        (HU, {"spacing": (1, 1), "orientation": "LPS"}, r"spacing \(1, 1\)"),
        (HU, {"spacing": (1, 0, 1), "orientation": "LPS"}, r"spacing \(1, 0, 1\)"),
        (HU, {"spacing": (1, 1, 1), "orientation": "LRS"}, "orientation 'LRS'"),
        (HU, {"spacing": (1, 1, 1), "orientation": "XYZ"}, "orientation 'XYZ'"),
        (HU, {"spacing": (1, 1, 99), "orientation": "LPS"}, "voxel size"),
        (HU, {"affine": np.diag([1, 1, np.nan, 1])}, "voxel size"),
        (HU[0], {"affine": np.eye(4)}, r"shape \(8, 20\) is not a CT volume"),
        (HU + 1000, {"affine": np.eye(4)}, "not HU"),
        (HU / 1e6, {"affine": np.eye(4)}, "not HU"),
        (HU * np.nan, {"affine": np.eye(4)}, "not finite"),
        (HU.astype(complex), {"affine": np.eye(4)}, "complex"),
        (nibabel.Nifti1Image(HU, np.eye(4)), {}, r"Nifti1Image .* image.get_fdata\(\)"),
        ({"hu": HU}, {"affine": np.eye(4)}, "dict is neither a path nor an array"),
        (None, {}, "NoneType is neither a path nor an array"),
    ],
)
def test_an_array_without_a_usable_geometry_is_refused(array, geometry, message):
    with pytest.raises(InputError, match=message):
        arrays.volume_of_array(array, **geometry)
