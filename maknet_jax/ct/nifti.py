"""CT volumes and label maps as NIfTI, converted to the standard orientation by their affine."""

import gzip
import io
import itertools
import os
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from maknet_jax.ct import containers, geometry, paged, reading, units
from maknet_jax.ct.reading import LARGEST_MATRIX, LARGEST_SERIES, one_line, quiet
from maknet_jax.errors import Rejected

if TYPE_CHECKING:
    from nibabel.arrayproxy import ArrayProxy
    from nibabel.nifti1 import Nifti1Image

SPACING = (0.05, 50.0)  # mm; outside this range the unit is not millimetres

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


class _Opened(NamedTuple):
    """A NIfTI file with a checked header; proxy, affine and shape are those of the stored array."""

    path: str
    proxy: "ArrayProxy"
    affine: np.ndarray
    axes: tuple[geometry.StoredAxis, geometry.StoredAxis, geometry.StoredAxis]
    shape: tuple[int, ...]
    spacing: tuple[float, float, float]  # mm along the standard z, y, x


def check_nifti(path: str | os.PathLike[str]) -> int:
    """Reads the header only and returns the number of axial slices.

    Raises:
      Rejected: not 3-D, no orientation or oblique.
    """
    opened = _open(path)
    return opened.shape[opened.axes[0].axis]


def read_nifti(
    path: str | os.PathLike[str], overrides: reading.Overrides = reading.STRICT
) -> tuple[np.ndarray, tuple[float, float, float], tuple[str, ...]]:
    """Reads a CT volume.

    Args:
      path: the file.
      overrides: whether values that do not look like HU are accepted.

    Returns:
      hu: int16 [Z, Y, X], head to feet; exact for integers without a slope, else rounded to the
        nearest (halves to even).
      spacing: mm along (z, y, x).
      stored: for each slice, as a string, its index along the stored z axis.

    Raises:
      Rejected: not 3-D, no orientation, oblique, not finite, or not HU.
    """
    opened = _open(path)
    values = _values(opened)
    hu = paged.empty(values.shape)
    counted = units.Values()
    for k, plane in enumerate(values):
        hu[k] = counted.add(_scaled(opened, plane))
        if k % 64 == 63:
            paged.release(values)
            paged.release(hu)
    counted.check(overrides)
    stored = [str(k) for k in range(len(hu))]
    return hu, opened.spacing, tuple(stored[::-1] if opened.axes[0].flip else stored)


def read_affine(path: str | os.PathLike[str]) -> np.ndarray:
    """`[4, 4]`: indices (x, y, z) of the volume that `read_nifti` returns, to RAS in mm.

    Raises:
      Rejected: as in `check_nifti`.
    """
    opened = _open(path)
    return geometry.standard_affine(opened.affine, opened.axes, opened.shape)


def load_label_map(
    path: str | os.PathLike[str], like: str | os.PathLike[str] | None = None
) -> np.ndarray:
    """Reads an integer label map, such as organ masks.

    Args:
      path: the file.
      like: the NIfTI file of the label map's CT; both must have the same voxel grid.

    Returns:
      uint16 [Z, Y, X], head to feet.

    Raises:
      Rejected: as in `read_nifti`, or not labels (integers from 0 to 65535), or another grid.
    """
    opened = _open(path)
    if like is not None:
        difference = _grid_difference(opened, _open(like))
        if difference:
            raise Rejected(f"its voxel grid differs from that of {like}: {difference}")
    values = _values(opened)
    labels = np.empty(values.shape, np.uint16)
    for k, plane in enumerate(values):
        plane = _scaled(opened, plane)
        valid = np.isfinite(plane).all() and plane.min() >= 0 and plane.max() <= 65535
        whole = np.rint(plane)
        # Float masks are often stored as integers and a slope, which is rounded to float32.
        if not (valid and np.allclose(plane, whole, rtol=1e-6, atol=1e-6)):
            raise Rejected("label map values must be whole numbers from 0 to 65535")
        labels[k] = whole
    return labels


def read_label_names(path: str | os.PathLike[str]) -> dict[int, str]:
    """The names of the values of a label map, from the label table in its header extension.

    TotalSegmentator writes such a table (Caret's XML) into maps of several organs.

    Returns:
      Value -> name; empty if the header has no label table.

    Raises:
      Rejected: the file or the table cannot be read.
    """
    try:
        with quiet():
            image = _load(path)
            # Not get_content(), which fails for extensions that nibabel cannot parse.
            contents = [bytes(extension.content) for extension in image.header.extensions]
        tables = [content for content in contents if b"<LabelTable" in content]
        if not tables:
            return {}
        if b"<!DOCTYPE" in tables[0]:  # its entities could expand without bound
            raise Rejected("the label table has a DOCTYPE: only plain XML is supported")
        labels = ElementTree.fromstring(tables[0].strip(b"\0 \n\r\t")).iter("Label")
        pairs = [(int(label.attrib["Key"]), (label.text or "").strip()) for label in labels]
        if len(dict(pairs)) < len(pairs):
            raise Rejected("the label table in the header names a value twice")
        return dict(pairs)
    except Rejected:
        raise
    except Exception as error:  # nibabel and the XML parser raise any exception on broken files
        raise Rejected(f"broken label table in the header ({one_line(error)})") from error


def _grid_difference(one: _Opened, other: _Opened) -> str:
    """How two voxel grids differ; "" if all corners agree to a tenth of a voxel."""
    if one.shape != other.shape:
        return f"shape {one.shape}, not {other.shape}"
    corners = np.array(list(itertools.product(*((0, count - 1) for count in one.shape))))
    away = corners @ (one.affine - other.affine)[:3, :3].T + (one.affine - other.affine)[:3, 3]
    distance = float(np.linalg.norm(away, axis=1).max())
    if distance > 0.1 * min(other.spacing):
        return f"the corners are up to {distance:.2f} mm apart"
    return ""


def _open(path: str | os.PathLike[str]) -> _Opened:
    """Reads and checks the header only."""
    try:
        with containers.open_file(path):  # nibabel hides why a file cannot be opened
            pass
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror or error})") from error
    try:
        with quiet():
            image = _load(path)
            shape = tuple(int(n) for n in image.shape)
            dtype = image.get_data_dtype()
            header = image.header
            forms = int(header["sform_code"]), int(header["qform_code"])
            qform = _qform(header) if forms[1] > 0 else None
            unit = header.get_xyzt_units()[0]
            affine = np.asarray(image.affine)
            proxy = cast("ArrayProxy", image.dataobj)
            header_size = int(header.single_vox_offset)
    except Exception as error:  # nibabel raises any exception on broken files
        raise Rejected(f"broken NIfTI file ({one_line(error)})") from error
    if proxy.offset < header_size:
        raise Rejected(
            f"vox_offset {proxy.offset} lies within the header: expected {header_size} or more; "
            "write the file again"
        )
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Rejected(f"NIfTI of shape {shape}: only 3-D volumes are supported")
    if dtype.kind not in "iuf":
        raise Rejected(f"NIfTI of {dtype}: only integers and floats are supported")
    if min(shape) < 1 or max(shape) > LARGEST_MATRIX or np.prod(shape) * 2 > LARGEST_SERIES:
        raise Rejected(
            f"NIfTI of shape {shape}: at most {LARGEST_MATRIX} per axis and 8 GiB as int16"
        )
    if forms == (0, 0):
        raise Rejected("neither sform nor qform: left and right are unknown")
    if unit not in ("mm", "unknown"):
        raise Rejected(f"the unit of the affine is {unit}: only mm is supported")
    axes, spacing = geometry_of(affine)
    if forms[0] > 0 and qform is not None and geometry_of(qform)[0] != axes:
        raise Rejected("sform and qform disagree about the orientation")
    z, y, x = axes
    return _Opened(
        str(path), proxy, affine, axes, shape, (spacing[z.axis], spacing[y.axis], spacing[x.axis])
    )


def _qform(header: Any) -> np.ndarray | None:
    """The affine of the qform, or None if its quaternion is invalid and there is a sform."""
    from nibabel.spatialimages import HeaderDataError

    try:
        return header.get_qform()
    except (HeaderDataError, ValueError):
        if int(header["sform_code"]) > 0:
            return None
        raise


def _load(path: str | os.PathLike[str]) -> "Nifti1Image":
    """The image of a file, or of a member of an archive, which is read as a stream."""
    import nibabel  # slow to import, and most runs read no NIfTI

    if not containers.in_archive(path):
        return cast("Nifti1Image", nibabel.load(path))
    file = cast("io.BufferedIOBase", containers.open_file(path))
    if os.fspath(path).lower().endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    version = file.read(4)
    file.seek(0)
    second = 540 in (int.from_bytes(version, "little"), int.from_bytes(version, "big"))
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    return cast("Nifti1Image", kind.from_stream(file))


def geometry_of(
    affine: np.ndarray,
) -> tuple[tuple[geometry.StoredAxis, geometry.StoredAxis, geometry.StoredAxis], list[float]]:
    """(standard axes, mm along each stored axis) of an affine [4, 4] to RAS.

    Raises:
      Rejected: it is oblique, singular, or not in millimetres.
    """
    columns = np.asarray(affine, float)[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    if not (
        np.isfinite(affine).all() and SPACING[0] <= spacing.min() <= spacing.max() <= SPACING[1]
    ):
        raise Rejected(f"voxel size {spacing} mm: expected {SPACING[0]} to {SPACING[1]} mm")
    axes = geometry.standard_axes((_RAS_TO_LPS @ (columns / spacing)).T)
    if sorted(stored.axis for stored in axes) != [0, 1, 2]:
        raise Rejected("the axes of the affine are not independent")
    return axes, [float(value) for value in spacing]


def _values(opened: _Opened) -> np.ndarray:
    """The stored values as a view [Z, Y, X] in the standard orientation, not yet scaled."""
    try:
        with quiet():
            if opened.path.lower().endswith(".gz"):
                values = _gzip_values(opened).reshape(opened.shape)
            else:
                values = np.asanyarray(opened.proxy.get_unscaled()).reshape(opened.shape)
    except Exception as error:
        raise Rejected(f"broken or truncated NIfTI data ({one_line(error)})") from error
    return geometry.to_standard(values, opened.axes)


def _gzip_values(opened: _Opened) -> np.ndarray:
    """The stored values, in a file that is read to its end.

    The checksum is in the last bytes; nibabel stops before them.
    """
    proxy = opened.proxy
    dtype, shape = np.dtype(proxy.dtype), proxy.shape
    size = int(np.prod(shape)) * dtype.itemsize
    with containers.open_file(opened.path) as packed, gzip.GzipFile(fileobj=packed) as file:
        file.seek(proxy.offset)
        content = paged.empty((size,), np.uint8)
        for block in paged.blocks(content):
            if file.readinto(block) < len(block):
                raise ValueError("the voxels end early")
        while rest := file.read(1 << 20):
            size += len(rest)
            if size > 2 * len(content) + (1 << 24):
                raise ValueError("more bytes after the voxels than voxels")
    return content.view(dtype).reshape(shape, order="F")


def _scaled(opened: _Opened, plane: np.ndarray) -> np.ndarray:
    slope, intercept = float(opened.proxy.slope), float(opened.proxy.inter)
    if (slope, intercept) == (1.0, 0.0):
        return plane
    return plane * slope + intercept
