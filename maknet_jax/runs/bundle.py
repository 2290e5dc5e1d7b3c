"""Bundles: a trained network in one folder, for this package and for other programs.

    BUNDLE/bundle.json          a description, and the size and SHA-256 of the other files
    BUNDLE/model.safetensors    params and batch_stats under their paths: "params/stem/conv/kernel"
    BUNDLE/network.stablehlo    the network for programs without this package, see `stablehlo`
    BUNDLE/README.md            the model card, see `card`
    BUNDLE/domain.safetensors   optional: out-of-domain statistics, `evaluation.domain.Domain`

A bundle is this folder, or a .zip of it whose members are at the top level or in one folder.
`bundle.json` has the fields of `FIELDS`, and can have a `note` on known limits. Its `sha256` is the
digest of its own JSON without this field, with sorted keys and without white space.

Reading a bundle does not execute, unpickle or extract anything. It checks names, sizes, digests and
shapes, and reads the weights from the safetensors. Hidden files in a folder (.DS_Store,
.gitattributes) are ignored; any other unexpected file is an error.
"""

import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import stat
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from flax import traverse_util
from ml_collections import ConfigDict

from maknet_jax import files
from maknet_jax.ct import preprocess
from maknet_jax.data import lesions
from maknet_jax.data.labels import Vocabulary
from maknet_jax.errors import InputError, OutputExists
from maknet_jax.runs import config as configs
from maknet_jax.runs import domain_file
from maknet_jax.runs.bundle_files import Member, damaged, open_members
from maknet_jax.training import transfer
from maknet_jax.training.state import Variables

FORMAT = "maknet-jax bundle 1"
INFO, WEIGHTS, NETWORK, CARD = "bundle.json", "model.safetensors", "network.stablehlo", "README.md"
CONTENT = (WEIGHTS, NETWORK, CARD)  # beside INFO and the optional domain_file.FILE
LARGEST_INFO = 16 << 20  # bytes
LARGEST_FILE = 8 << 30  # bytes
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # safetensors' names
# Field -> description.
FIELDS = {
    "format": "`FORMAT`",
    "name": "a title",
    "config": "the training config without its paths; the network is built from it",
    "labels": "name, class, parents and exclusive labels, in column order",
    "thresholds": "one per label; a label is predicted if its confidence reaches it",
    "preprocessing": "how CT becomes input, see `preprocessing`",
    "checkpoint": "name (best or last), step, and digest of the float32 weights",
    "weights": "dtype of the stored kernels, digest and number of the restored weights",
    "data": "fingerprint, origin (kind, source, citation, licence), images per split, if known",
    "metrics": "of validation and evaluation, if measured at this step",
    "out_of_domain": "what domain.safetensors was computed from; null without this file",
    "stablehlo": "platforms, form of MAKConv, inputs and outputs of network.stablehlo",
    "versions": "of the packages that wrote it",
    "files": "name -> size in bytes and SHA-256, of each other file",
    "sha256": "digest of this file, see above",
}
# Paths on the machine that trained the network.
_PATHS = (("data", "path"), ("pseudo", "path"), ("init", "path"))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked; `variables` checks the shapes of its weights.

    Attributes:
      info: `bundle.json`.
      config: the locked config.
      vocabulary: the labels in column order.
      thresholds: float `[K]`.
      arrays: path ("params/stem/conv/kernel") -> float32 array.
      domain: the out-of-domain statistics; None without them.
      source: where it was read from.
    """

    info: dict[str, Any]
    config: ConfigDict
    vocabulary: Vocabulary
    thresholds: np.ndarray
    arrays: dict[str, np.ndarray]
    domain: domain_file.Statistics | None
    source: pathlib.Path

    def variables(self, shapes: Variables | None = None) -> Variables:
        """The weights as nested dicts: params and batch_stats.

        Args:
          shapes: the network's variables, arrays or `jax.ShapeDtypeStruct`; None skips the check.

        Raises:
          InputError: the weights are not those of this network.
        """
        if shapes is not None:
            expected = {name: leaf.shape for name, leaf in transfer.named(shapes).items()}
            for name in sorted(expected.keys() | self.arrays.keys()):
                actual = self.arrays[name].shape if name in self.arrays else "missing"
                shape = expected.get(name, "unknown")
                if actual != shape:
                    raise damaged(
                        self.source, f"{name} is {actual} in {WEIGHTS}, {shape} in the network"
                    )
        try:
            tree = traverse_util.unflatten_dict(self.arrays, sep="/")
        except (TypeError, ValueError):  # "a" and "a/b"
            raise damaged(self.source, f"the names in {WEIGHTS} contradict each other") from None
        return {"params": {}, "batch_stats": {}} | tree


def is_bundle(path: pathlib.Path) -> bool:
    """Whether a path looks like a bundle: a folder with `bundle.json`, or a .zip."""
    if path.is_dir():
        return (path / INFO).is_file()
    return path.suffix.lower() == ".zip"


def released() -> dict[str, pathlib.Path]:
    """The bundles that come with the package: name -> folder or .zip."""
    folder = pathlib.Path(__file__).resolve().parents[1] / "released"
    return {title(path): path for path in sorted(folder.glob("*")) if is_bundle(path)}


def title(path: pathlib.Path) -> str:
    """The name of a folder, or of a .zip without its ending."""
    return path.name if path.is_dir() else path.stem


def preprocessing(config: ConfigDict, *, takes_box: bool) -> dict[str, Any]:
    """How CT becomes the input of a network, as JSON for `bundle.json`.

    Args:
      config: of the network.
      takes_box: whether its input is patches around lesions, as in LesaNet.
    """
    rules: dict[str, Any] = {
        "input": "int16 HU [B, size, size, 3]; the network applies the window itself",
        "size": config.data.size,
        "window": list(config.data.window),
        "orientation": "slices head to feet, rows anterior to posterior, columns right to left",
        "slices": 3,
        "padding": f"HU <= {preprocess.PADDING} and below {preprocess.AIR} become {preprocess.AIR}",
    }
    if takes_box:
        return rules | {"slice_distance_mm": lesions.SLICE_DISTANCE, "crop": lesions.RULE}
    return rules | {
        "slice_distance_mm": None,  # consecutive slices, whatever their distance
        "crop": preprocess.CROP_RULE,
        "resize": "the crop to a square, bilinear and antialiased",
        "ends": "the first and the last slice are their own neighbours",
    }


def without_paths(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON without the paths of the training machine."""
    values = configs.to_json(config)
    for group, field in _PATHS:
        values[group][field] = ""
    return values


def pack(params: Variables, batch_stats: Variables, dtype: str) -> Variables:
    """Weights in the dtypes in which they are stored.

    Args:
      params: nested float32 arrays.
      batch_stats: nested float32 arrays.
      dtype: of the kernels (arrays of two axes or more): "float32", "float16" or "bfloat16".
        Biases, scales and statistics are small and stay float32.

    Raises:
      InputError: the dtype is unknown, or a weight overflows it.
    """
    known = {np.dtype(kind).name: kind for kind in DTYPES.values()}
    if dtype not in known:
        raise InputError(f"dtype {dtype!r} is unknown: choose one of {', '.join(known)}")
    stored = {}
    for name, leaf in transfer.named({"params": params, "batch_stats": batch_stats}).items():
        array = np.asarray(leaf, np.float32, order="C")
        kernel = name.startswith("params/") and array.ndim > 1
        if kernel and dtype == "float16" and np.abs(array).max(initial=0) > np.finfo("f2").max:
            raise InputError(f"{name} has weights beyond float16: choose bfloat16 or float32")
        stored[name] = array.astype(known[dtype]) if kernel else array
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(stored, sep="/")


def write(
    out: str | os.PathLike[str],
    info: Mapping[str, Any],
    content: Mapping[str, bytes],
    *,
    zipped: bool = False,
    overwrite: bool = False,
) -> list[pathlib.Path]:
    """Writes a bundle atomically.

    Args:
      out: the folder.
      info: the fields of `bundle.json` except `format`, `files` and `sha256`.
      content: the bytes of each of `CONTENT`, and of `domain_file.FILE` if `out_of_domain` is set.
      zipped: also write OUT.zip, whose bytes depend on the content alone.
      overwrite: replace an existing bundle; anything else is never replaced.

    Returns:
      The written paths.

    Raises:
      InputError: `out` or OUT.zip exists.
    """
    out = pathlib.Path(out).absolute()
    archive = out.with_name(f"{out.name}.zip")
    check_free(out, zipped=zipped, overwrite=overwrite)
    entries = {
        name: {"size": len(content[name]), "sha256": hashlib.sha256(content[name]).hexdigest()}
        for name in contained(info)
    }
    info = {"format": FORMAT, **info, "files": entries}
    info["sha256"] = _self_digest(info)
    text = json.dumps(info, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    everything = {INFO: text.encode(), **{name: content[name] for name in entries}}
    with files.write_folder(out, replace=lambda path: overwrite and is_bundle(path)) as folder:
        for name, payload in everything.items():
            with files.write_whole(folder / name, "wb") as file:
                file.write(payload)
    if not zipped:
        return [out]
    with files.write_whole(archive, "wb") as file, zipfile.ZipFile(file, "w") as members:
        for name, payload in everything.items():
            member = zipfile.ZipInfo(f"{out.name}/{name}")  # dated 1980: equal content, equal bytes
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            members.writestr(member, payload)  # stored: weights do not compress
    return [out, archive]


def contained(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the files beside `bundle.json`."""
    return CONTENT if info["out_of_domain"] is None else (*CONTENT, domain_file.FILE)


def check_free(
    out: str | os.PathLike[str], *, zipped: bool = False, overwrite: bool = False
) -> None:
    """Checks that `write` may write to `out`.

    Raises:
      InputError: `out` or, with `zipped`, OUT.zip exists.
    """
    out = pathlib.Path(out).absolute()
    archive = out.with_name(f"{out.name}.zip")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not out.is_dir() or not is_bundle(out):
            raise InputError(f"--out {out} exists and is not a bundle: choose another folder")
        if not overwrite:
            raise OutputExists(out)
    if zipped and archive.exists() and not (overwrite and archive.is_file()):
        raise OutputExists(archive)


def read(path: str | os.PathLike[str]) -> Bundle:
    """Reads and checks a bundle.

    Args:
      path: a folder or a .zip.

    Raises:
      InputError: it is damaged, or not a bundle that this version can read.
    """
    path = pathlib.Path(path)
    with open_members(path) as members:
        info = read_info(path, members)
        content = {name: _read_checked(path, members, info, name) for name in contained(info)}
    arrays, domain = _read_arrays(path, WEIGHTS, content[WEIGHTS]), None
    if domain_file.FILE in content:
        statistics = _read_arrays(path, domain_file.FILE, content[domain_file.FILE])
        domain = domain_file.Statistics(statistics, info["out_of_domain"])
    return Bundle(info, *_described(path, info), arrays, domain, path)


def read_card(path: str | os.PathLike[str]) -> str:
    """The text of the model card of a bundle, checked against its digest.

    Raises:
      InputError: it is damaged.
    """
    path = pathlib.Path(path)
    with open_members(path) as members:
        info = read_info(path, members)
        return _read_checked(path, members, info, CARD).decode(errors="replace")


def read_info(path: pathlib.Path, members: Mapping[str, Member]) -> dict[str, Any]:
    """`bundle.json`, checked against its digest and against the list of files."""
    if INFO not in members:
        raise InputError(f"{path} is not a bundle: it has no {INFO}")
    if members[INFO].size > LARGEST_INFO:
        raise damaged(path, f"{INFO} has {members[INFO].size:,} bytes")
    try:
        info = json.loads(members[INFO].read(LARGEST_INFO))
        version = info["format"]
        intact = info["sha256"] == _self_digest(info)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, f"{INFO} is not the JSON of a bundle") from None
    if version != FORMAT:
        raise InputError(
            f"{path} has format {version!r}, but this version reads {FORMAT!r}: install the "
            "version that wrote it"
        )
    if not intact:
        raise damaged(path, f"{INFO} does not match its digest")
    lacking = sorted(FIELDS.keys() - info.keys())
    if lacking:
        raise damaged(path, f"{INFO} lacks {lacking[0]}")
    for name in sorted({*contained(info), INFO} ^ members.keys()):
        missing = name not in members
        raise damaged(path, f"{name} {'is missing' if missing else 'does not belong there'}")
    return info


def _self_digest(info: Mapping[str, Any]) -> str:
    content = {key: value for key, value in info.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_checked(
    path: pathlib.Path, members: Mapping[str, Member], info: Mapping[str, Any], name: str
) -> bytes:
    """The bytes of a file of the bundle, checked against their size and digest."""
    try:
        size, digest = info["files"][name]["size"], info["files"][name]["sha256"]
        size = operator.index(size)
    except (KeyError, TypeError):
        raise damaged(path, f"{INFO} has no size and digest of {name}") from None
    if members[name].size != size or size > LARGEST_FILE:
        raise damaged(path, f"{name} has {members[name].size:,} bytes, not {size:,}")
    content = members[name].read(size)
    if hashlib.sha256(content).hexdigest() != digest:
        raise damaged(path, f"{name} does not match its digest")
    return content


def _described(
    path: pathlib.Path, info: Mapping[str, Any]
) -> tuple[ConfigDict, Vocabulary, np.ndarray]:
    """Config, labels and thresholds, checked against each other and this version."""
    try:
        config = configs.from_json(info["config"])
        vocabulary = Vocabulary.from_json(info["labels"])
        count = len(set(vocabulary.names))
        _ = vocabulary.parents, vocabulary.exclusive  # KeyError: a relation to an unknown label
        thresholds = np.asarray(info["thresholds"], np.float64)
        takes_box = info["preprocessing"]["crop"] == lesions.RULE
        rules = preprocessing(config, takes_box=takes_box)
        dict(info["checkpoint"])["step"] + 0, str(info["checkpoint"]["name"])
        dict(info["data"].get("origin") or {}), dict(info["out_of_domain"] or {})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise damaged(path, f"{INFO} is not complete ({reason})") from None
    if thresholds.shape != (len(vocabulary),) or count != len(vocabulary) or not count:
        raise damaged(path, f"{thresholds.shape} thresholds of {len(vocabulary)} labels")
    if not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise damaged(path, "thresholds should be in 0..1")
    for name, rule in rules.items():
        if info["preprocessing"].get(name) != rule:
            raise InputError(
                f"bundle {path} needs {name} {info['preprocessing'].get(name)!r}, but this version "
                f"has {rule!r}: install the version that wrote it ({info['versions']})"
            )
    return config, vocabulary, thresholds


def _read_arrays(path: pathlib.Path, file: str, content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, restored to float32."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise damaged(path, f"{file} is not safetensors ({error})") from None
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in DTYPES:
            raise InputError(
                f"bundle {path}: {name} has dtype {tensor['dtype']}: expected {', '.join(DTYPES)}"
            )
        array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        arrays[name] = array.astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise damaged(path, f"{name} holds NaN or infinity")
    return arrays
