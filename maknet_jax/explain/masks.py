"""Regions of an image: from masks of its slice, or from DeepLesion's boxes."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from maknet_jax import files
from maknet_jax.attribution import perturbation
from maknet_jax.ct import nifti, png
from maknet_jax.data import records, segmentation_cases
from maknet_jax.errors import InputError, Rejected, did_you_mean
from maknet_jax.explain.selection import SelectedImage, Selection, digest, sizes


def check_masks(masks: pathlib.Path, organs: Sequence[str] | None) -> str:
    """Checks for errors that would reject every image; returns a digest of the masks.

    Args:
      masks: a NIfTI, a PNG or a folder, see `find_regions`.
      organs: names or values in the masks.

    Raises:
      InputError: the masks do not exist or cannot be read, or an organ is unknown.
    """
    if not masks.exists():
        raise InputError(f"--masks {masks} does not exist: pass a NIfTI, a PNG or a folder")
    in_cases = _case_organs(masks) if organs else set()
    for organ in organs or ():
        if organ not in in_cases:
            _value(organ, {name: "" for name in in_cases} | _organ_values(masks))
    try:
        if _is_nifti(masks):
            nifti.check_nifti(masks)
        elif masks.is_file():
            _read_png(masks)
    except Rejected as error:
        raise InputError(f"--masks {masks}: {error}") from None
    if masks.is_file():
        return hashlib.sha256(masks.read_bytes()).hexdigest()[:16]
    return digest(sizes(sorted(path for path in masks.rglob("*") if path.is_file())))


def with_regions(
    selection: Selection,
    *,
    masks: str | pathlib.Path | None,
    organs: Sequence[str] | None,
    size: int,
) -> Selection:
    """The selection with the `regions` of its images set, see `find_regions`."""

    def read(reader: Callable[[], SelectedImage]) -> SelectedImage:
        image = reader()
        try:
            regions = find_regions(image, masks=masks, organs=organs, size=size)
        except Rejected as error:
            reason = "its mask cannot be used" if image.private else str(error)
            raise Rejected(image.id, reason) from error
        return dataclasses.replace(image, regions=regions)

    readers: list[Callable[[], SelectedImage]] = [
        functools.partial(read, reader) for reader in selection.readers
    ]
    return dataclasses.replace(selection, readers=readers)


def find_regions(
    image: SelectedImage | records.Example,
    *,
    masks: str | pathlib.Path | None,
    organs: Sequence[str] | None,
    size: int,
) -> dict[str, np.ndarray]:
    """The regions of an image: name -> bool `[size, size]`, without those outside the image.

    Args:
      image: the image.
      masks: masks of whole slices: a NIfTI of labels, a PNG, a folder of PNGs named like the
        slices, a folder of organ maps as written by the phantom, or the folder of NIfTI cases that
        `maknet prepare segmentations` read. None takes DeepLesion's box.
      organs: names or values in the masks, each a separate region; None takes all nonzero pixels as
        one region. An organ that was not contoured in a case has no region.
      size: the edge of the image in pixels.

    Raises:
      Rejected: no region is inside the image, one fills it, or the image has no mask.
      InputError: an organ is unknown.
    """
    crop, box = image.meta.get("crop"), image.meta.get("box")  # for a patch, in its own pixels
    if crop is not None:  # DeepLesion counts pixels from 1
        box = [place - 1 for place in image.meta.get("slice_box") or ()]
    if masks is None:
        if not box:
            raise Rejected("no box (only DeepLesion has boxes): add --masks")
        regions = {"lesion": perturbation.box_region(box, crop or (0, 0, size, size), size)}
    else:
        if crop is None:
            raise Rejected(
                "a patch around a lesion, but masks are of whole slices: omit --masks to use the "
                "lesion's box"
            )
        planes = _organ_planes(image, pathlib.Path(masks), organs)
        shape, (*_, bottom, right) = image.meta.get("shape"), crop
        # Records store the position of the crop in the slice, but not the size of the slice.
        for plane in planes.values():
            known = shape is None or tuple(shape[-2:]) == plane.shape
            if not known or bottom > plane.shape[0] or right > plane.shape[1]:
                of = "{1} x {2}".format(*shape) if shape else f"{bottom} x {right} or more"
                raise Rejected(
                    "the mask is {} x {}, but the slice is {}: pass masks of whole slices".format(
                        *plane.shape, of
                    )
                )
        regions = {
            name: perturbation.mask_region(plane, crop, size) for name, plane in planes.items()
        }
    regions = {name: region for name, region in regions.items() if region.any()}
    if not regions:
        raise Rejected("no region is inside the image")
    for name, region in regions.items():
        if region.all():
            raise Rejected(f"region {name} fills the whole image: there are no pixels around it")
    return regions


def _value(organ: str, values: dict[str, str]) -> int:
    value = values.get(organ, organ)
    try:
        return int(value)
    except ValueError:
        hint = did_you_mean(organ, values) if values else "the masks have numbers only"
        raise InputError(f"--organs {organ!r} is unknown: {hint}") from None


def _organ_planes(
    image: SelectedImage | records.Example, masks: pathlib.Path, organs: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Organ name -> bool `[H, W]` in the image's slice; "region" if `organs` is None."""
    if "case" in image.meta:
        names = tuple(map(str, organs)) if organs else None
        volumes = _case_masks(str(masks), image.meta["case"], names)
        for volume in volumes.values():
            _check_count(len(volume), image.meta["slices"], f"case {image.meta['case']}")
        planes = {name: volume[image.meta["slice"]] for name, volume in volumes.items()}
        return planes if organs else {"region": np.any(list(planes.values()), axis=0)}
    plane, values = _mask_of(image, masks)
    if not organs:
        return {"region": plane != 0}
    return {str(organ): plane == _value(organ, values) for organ in organs}


def _check_count(slices: int, expected: int, name: str) -> None:
    if slices != expected:
        raise Rejected(
            f"{name} has {slices} slices, but the series has {expected}: pass the mask of this "
            "series"
        )


@functools.lru_cache(maxsize=1)
def _case_masks(masks: str, name: str, organs: tuple[str, ...] | None) -> dict[str, np.ndarray]:
    """The organs of a case: name -> bool `[Z, Y, X]`, without those that have no mask."""
    case = segmentation_cases.find_nifti_case(pathlib.Path(masks), name)
    maps: dict[str, np.ndarray] = {}
    volumes = {}
    for organ, mask in case.masks:
        if organs and organ not in organs:
            continue
        if mask.path not in maps:
            maps = {mask.path: nifti.load_label_map(mask.path, like=case.ref.paths[0])}
        volume = maps[mask.path]
        volumes[organ] = volume > 0 if mask.kind == "file" else volume == mask.number
    if not volumes:
        raise Rejected(f"case {name} has no mask of {', '.join(organs or ('any organ',))}")
    return volumes


def _case_organs(masks: pathlib.Path) -> set[str]:
    """The organs of a folder of cases; empty if it is something else."""
    if not masks.is_dir() or not any(masks.rglob("ct.nii*")):
        return set()
    cases = segmentation_cases.find_cases(masks).cases
    return {name for case in cases for name, _ in case.masks}


def _mask_of(
    image: SelectedImage | records.Example, masks: pathlib.Path
) -> tuple[np.ndarray, dict[str, str]]:
    """(mask or label map of the image's slice, organ name -> value)."""
    if "file" not in image.meta:
        raise Rejected("the record has no file name to find its mask by: pass the CT files instead")
    name, values = pathlib.Path(image.meta["file"]), _organ_values(masks)
    if _is_nifti(masks):
        if "shape" not in image.meta:
            raise Rejected(
                f"{masks} is the mask of a volume, but the image is a slice of a prepared data "
                "set: pass the CT files instead"
            )
        like = image.meta["file"] if image.meta["kind"] == "nifti" else None
        volume = _label_map(str(masks), like)
        _check_count(len(volume), image.meta["shape"][0], str(masks))
        return volume[image.meta["slice"]], values
    series, index = png.split_name(name)
    stored = masks / f"{series}.npz"
    if stored.exists():
        with np.load(stored) as maps:
            key = "none" if index is None else f"{index:03d}"
            if key not in maps:
                raise Rejected(f"{stored} has no map {key}")
            return maps[key], values
    return _read_png(masks / name.with_suffix(".png").name if masks.is_dir() else masks), values


def _is_nifti(masks: pathlib.Path) -> bool:
    return masks.name.lower().endswith((".nii", ".nii.gz")) and not masks.is_dir()


def _organ_values(masks: pathlib.Path) -> dict[str, str]:
    """Organ name -> value, from organs.json in a folder of masks or in its parent."""
    above = [folder / "organs.json" for folder in (masks, masks.parent) if masks.is_dir()]
    names: dict[str, str] = next((files.read_json(file) for file in above if file.exists()), {})
    return {organ: value for value, organ in names.items()}


def _read_png(file: pathlib.Path) -> np.ndarray:
    """The stored values, because converting palette and 16-bit files to grey would change them."""
    try:
        with Image.open(file) as picture:
            if picture.mode not in ("1", "L", "P", "I", "I;16"):
                raise Rejected(f"{file} has mode {picture.mode}: a mask needs one channel")
            return np.asarray(picture)
    except FileNotFoundError:
        raise Rejected(f"mask {file} not found") from None
    except (OSError, SyntaxError) as error:
        raise Rejected(f"{file} is not a valid PNG ({error})") from None


@functools.lru_cache(maxsize=1)
def _label_map(masks: str, like: str | None) -> np.ndarray:
    return nifti.load_label_map(masks, like=like)
