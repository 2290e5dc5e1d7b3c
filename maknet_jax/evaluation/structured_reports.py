"""The coded labels of DICOM series as DICOM structured reports (PS3.16, TID 1500).

A report has one measurement group (TID 1501) for the regions that the series shows, and one for
each label with a SNOMED CT code: the code as finding site, with laterality, the slices with the
label, and the mean confidence over them as Certainty of Finding in percent. Writing needs
highdicom, the extra `sr`.
"""

import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom import uid as dicom_uid
from pydicom import valuerep

import maknet_jax
from maknet_jax import files
from maknet_jax.ct import containers, dicom_frames, dicom_seg, reading, search, transfer_syntax
from maknet_jax.errors import Rejected
from maknet_jax.evaluation import body_parts
from maknet_jax.evaluation.series import SeriesResult

EXTRA = "sr"
# Elements of patient and study that highdicom copies; they may be empty (type 2).
_PATIENT = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_SIDES = {"L": ("7771000", "Left"), "R": ("24028007", "Right")}  # SNOMED CT


def require_highdicom() -> Any:
    """Imports highdicom.

    Raises:
      InputError: it is not installed.
    """
    return dicom_seg.require_highdicom("A DICOM SR", EXTRA)


def write_reports(
    out: pathlib.Path,
    results: Sequence[SeriesResult],
    series: Sequence[search.SeriesRef],
    network: str,
) -> tuple[list[pathlib.Path], list[tuple[str, str]]]:
    """Writes STEM.NNN.sr.dcm for each DICOM series with a coded label.

    Args:
      out: the CSV of `maknet predict`.
      results: number -> predictions.
      series: the inputs, whose keys are the ids of the results.
      network: what made the predictions.

    Returns:
      The files, and (series, reason) of each series without a report.
    """
    written: list[pathlib.Path] = []
    without: list[tuple[str, str]] = []
    paths: dict[str, tuple[str, ...]] = {
        ref.key: ref.paths for ref in series if ref.kind == "dicom"
    }
    for number, result in enumerate(results):
        try:
            with reading.quiet():
                data = report_of(result, _header(paths.get(result.id, ())), network)
        except Rejected as error:
            without.append((result.id, str(error)))
        except Exception as error:  # headers may hold anything, and pydicom raises any exception
            problem = f"its header breaks the standard ({reading.one_line(error)})"
            without.append((result.id, problem))
        else:
            written.append(out.with_suffix(f".{number:03d}.sr.dcm"))
            with files.write_whole(written[-1], "wb") as file:
                data.save_as(file, enforce_file_format=True)
    return written, without


def report_of(
    result: SeriesResult, header: pydicom.Dataset | None, network: str
) -> pydicom.Dataset:
    """The report of a series.

    Args:
      result: the predictions.
      header: of one of its files; None if it is not DICOM.
      network: what made the predictions.

    Raises:
      Rejected: it is not DICOM, a UID is missing, nothing in it has a code, or it is outside the
        domain of the network.
    """
    hd = require_highdicom()
    if header is None:
        raise Rejected("not DICOM")
    if result.outside:
        raise Rejected("outside the domain of the network: its labels are unreliable")
    for name in ("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not header.get(name) or not isinstance(header.get(name), str):
            raise Rejected(f"its files have no single {name}")
    if not all(re.fullmatch(r"[0-9.]+(:[0-9]+)?", uid) for uid in result.uids):
        raise Rejected("its files have no valid SOPInstanceUID")
    groups = [
        _group(hd, header, result, name, part, slices, network)
        for name, part, slices in _findings(result)
    ]
    if not groups:
        raise Rejected("no predicted label has a SNOMED CT code")
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=dicom_uid.generate_uid(entropy_srcs=["maknet-jax", network]),
        name="maknet-jax",
        model_name=network[:64],
    )
    observer = hd.sr.ObserverContext(hd.sr.CodedConcept("121007", "DCM", "Device"), device)
    content = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(observer_device_context=observer),
        hd.sr.CodedConcept("77477000", "SCT", "Computed tomography"),
        groups,
        title=hd.sr.CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    with warnings.catch_warnings():
        # A name of a single component, as in pseudonymised CT, is copied as it is.
        warnings.filterwarnings("ignore", message=".*unlikely to represent the intended person")
        return hd.sr.EnhancedSR(
            evidence=[_image(header, uid) for uid in dict.fromkeys(map(_instance, result.uids))],
            content=content[0],
            series_instance_uid=dicom_uid.generate_uid(),
            series_number=1,
            sop_instance_uid=dicom_uid.generate_uid(),
            instance_number=1,
            manufacturer="maknet-jax",
        )


def _header(paths: Sequence[str]) -> pydicom.Dataset | None:
    """The header of the first file, without pixels."""
    if not paths:
        return None
    with containers.open_file(dicom_frames.split_path(paths[0])[0]) as file:
        whole = transfer_syntax.bounded(file)
        return pydicom.dcmread(whole, stop_before_pixels=True, force=True)


def _findings(
    result: SeriesResult,
) -> list[tuple[str, body_parts.BodyPart, np.ndarray]]:
    """(name, body part with a code, numbers of the slices with it)."""
    findings = [("regions of the series", result.body_part, np.arange(len(result)))]
    for cover in result.covers:
        column = result.names.index(cover.label)
        findings.append((cover.label, cover.body_part, np.flatnonzero(result.predicted[:, column])))
    return [finding for finding in findings if finding[1].code != body_parts.NO_CODE]


def _group(
    hd: Any,
    header: pydicom.Dataset,
    result: SeriesResult,
    name: str,
    part: body_parts.BodyPart,
    slices: np.ndarray,
    network: str,
) -> Any:
    """A measurement group, TID 1501."""
    side = _SIDES.get(part.laterality)
    site = hd.sr.FindingSite(
        hd.sr.CodedConcept(part.code, "SCT", part.meaning),
        laterality=hd.sr.CodedConcept(side[0], "SCT", side[1]) if side else None,
    )
    measurements = []
    if name in result.names:
        confidence = float(result.confidences[slices, result.names.index(name)].mean())
        certainty = hd.sr.CodedConcept("111012", "DCM", "Certainty of Finding")
        percent = hd.sr.CodedConcept("%", "UCUM", "Percent")
        measurements.append(hd.sr.Measurement(certainty, round(100 * confidence, 2), percent))
    frames: dict[str, list[int]] = {}
    for number in slices.tolist():
        instance, _, frame = result.uids[number].partition(":")
        frames.setdefault(instance, []).extend([int(frame)] if frame else [])
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(dicom_uid.generate_uid(), name),
        finding_type=hd.sr.CodedConcept("123037004", "SCT", "Body structure"),
        algorithm_id=hd.sr.AlgorithmIdentification(network, maknet_jax.__version__),
        finding_sites=[site],
        measurements=measurements,
        source_images=[
            hd.sr.SourceImageForMeasurementGroup(header.SOPClassUID, instance, numbers or None)
            for instance, numbers in frames.items()
        ],
    )


def _instance(uid: str) -> str:
    """The SOPInstanceUID of a slice that may be a frame."""
    return uid.partition(":")[0]


def _image(header: pydicom.Dataset, instance: str) -> pydicom.Dataset:
    """The header of a file of the same series."""
    image = pydicom.Dataset()
    # Elements are shared, and setting the value of one would change it in all images.
    image.update({e.tag: e for e in header if e.keyword != "SOPInstanceUID"})
    image.SOPInstanceUID = instance
    for name in _PATIENT:
        if not _is_valid(name, image.get(name)):  # or anonymised
            image.pop(name, None)
            setattr(image, name, "")
    image.pop("SpecificCharacterSet", None)  # the texts are decoded already
    image.SpecificCharacterSet = "ISO_IR 192"
    return image


def _is_valid(name: str, value: Any) -> bool:
    """Whether highdicom copies a value of an element in `_PATIENT`."""
    if name == "PatientSex":
        return value in ("M", "F", "O")
    if value is None or isinstance(value, pydicom.multival.MultiValue):
        return False
    try:
        if name.endswith("Date"):
            valuerep.DA(value)
        elif name.endswith("Time"):
            valuerep.TM(value)
    except (ValueError, TypeError):
        return False
    return True
