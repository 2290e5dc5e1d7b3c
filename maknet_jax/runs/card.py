"""The model card of a bundle, in the form of the Hugging Face Hub: YAML, then Markdown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from maknet_jax import console
from maknet_jax.data.labels import Vocabulary
from maknet_jax.runs import domain_file

_METRICS = {"auc": "roc_auc", "f1": "f1", "precision": "precision", "recall": "recall"}
_SHOWN = 40  # labels

_SNIPPET = """import jax.export
import numpy as np
from safetensors.flax import load_file

with open("network.stablehlo", "rb") as file:
    network = jax.export.deserialize(bytearray(file.read()))
weights = load_file("model.safetensors")
images = np.full((2, {size}, {size}, 3), -1000, np.int16)  # HU: crop, resize, three slices
{call}
confidences = 1 / (1 + np.exp(-np.asarray(outputs["logits"])))  # [2, {labels}]
features = np.asarray(outputs["features"])"""


def model_card(info: Mapping[str, Any], license_name: str, folder: str) -> str:
    """The text of README.md.

    Args:
      info: the fields of `bundle.json`, see `bundle.FIELDS`.
      license_name: an identifier of the Hub, such as apache-2.0 or cc-by-4.0, or "other".
      folder: the name of the folder of the bundle, or of the released model.
    """
    data, rules = info["data"], info["preprocessing"]
    names = Vocabulary.from_json(info["labels"]).names
    header = {
        "license": license_name,
        "library_name": "maknet-jax",
        "pipeline_tag": "image-classification",
        "tags": ["computed-tomography", "medical-imaging", "multi-label", "jax", "safetensors"],
        "metrics": list(_METRICS.values()),
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    takes_box = rules["slice_distance_mm"] is not None
    call = "outputs = network.call(weights, images)"
    if takes_box:
        call = (
            "boxes = np.array([[40, 40, 80, 80]] * 2, np.float32)  # x0, y0, x1, y1\n"
            "outputs = network.call(weights, images, boxes)"
        )
    snippet = _SNIPPET.format(size=rules["size"], call=call, labels=len(names))
    more = f" and {len(names) - _SHOWN} more in bundle.json" if len(names) > _SHOWN else ""
    distance = "consecutive slices"
    if takes_box:
        distance = f"slices {rules['slice_distance_mm']:g} mm apart"
    return f"""---
{yaml}
---

# {info["name"]}

A {info["config"]["model"]["name"]} network that predicts {len(names)} labels for each slice of a CT
volume. It was exported from the {info["checkpoint"]["name"]} checkpoint of a training run of
maknet-jax at step {info["checkpoint"]["step"]}.

**Research software, not a medical device.** Its output is not a diagnosis and must not be used to
decide about the care of a patient.

## Use

With maknet-jax, where `{folder}` is the path of this folder or of its .zip (the name alone is
enough for a model that comes with the package, see `maknet models`):

```
maknet predict scans/ --model {folder} --out labels.csv
```

```python
import maknet_jax

model = maknet_jax.load("{folder}")
print(model.predict("scans/series"))
```

Without maknet-jax, with JAX, NumPy and safetensors alone, on CPU, GPU or TPU, in batches of any
size (each new size is compiled once). `network.stablehlo` takes the weights as an argument, so both
ways use the same `model.safetensors`:

```python
{snippet}
```

## Input

- {rules["input"]}; size is {rules["size"]}.
- Three {distance} are the channels; {rules["orientation"]}.
- Crop: {rules["crop"]}.
- Window of the network: {rules["window"][0]:g} to {rules["window"][1]:g} HU. {rules["padding"]}.

## Labels

{", ".join(names[:_SHOWN])}{more}. A label is predicted if its confidence reaches its threshold in
`bundle.json`, or if it is a parent of a predicted label.{_never(info["thresholds"], names)}

## Training data

{_data(data)}

## Scores

{_scores(info)}

## Intended use and limits

Sorting, searching and selecting CT for research: which part of the body a series shows, which
slices to look at, features for small classifiers. The network was trained only on the images named
above: other scanners, contrast phases, body regions, ages or implants, and anything that is not CT,
may get confident wrong labels. Confidences are not calibrated probabilities. Labels that are rare
in the training data are unreliable: `maknet evaluate` reports the scores per label on your own
data.

{_note(info)}{_domain(info["out_of_domain"])}
"""


def license_of(card: str) -> str:
    """The licence in the header of a model card; "other" if it has none."""
    for line in card.partition("\n---\n")[0].splitlines():
        key, _, value = line.partition(": ")
        if key == "license":
            return value.strip('" ')
    return "other"


def _never(thresholds: Sequence[float], names: Sequence[str]) -> str:
    """The labels without a threshold, as a paragraph; "" if there are none."""
    never = [name for name, limit in zip(names, thresholds, strict=True) if limit >= 1]
    if not never:
        return ""
    return (
        f"\n\n**Without a threshold: {console.shortened(never, _SHOWN)}.** All or none of the "
        "tuning images have them, or no threshold finds them: they are predicted only as "
        "parents of other labels. Their confidences are reported."
    )


def _note(info: Mapping[str, Any]) -> str:
    """The known limits of this network, as a paragraph; "" without any."""
    return f"{info['note']}\n\n" if info.get("note") else ""


def _domain(about: Mapping[str, Any] | None) -> str:
    """What the out-of-domain statistics find, and what is not measured."""
    if not about:
        return (
            "This bundle has no out-of-domain statistics: nothing marks CT unlike the training CT."
        )
    patients = (
        f"{about['training_slices']:,} training slices of {about['training_patients']} patients"
    )
    tuning = (
        f"{console.plural(about['tuning_slices'], 'slice')} of "
        f"{console.plural(about['tuning_patients'], 'other patient')}"
    )
    marked = (
        "slices and series that differ from the training data (flag\n`outside`), and series whose "
        "slices do not run from head to feet as there (flag `order`)"
    )
    if missing := domain_file.not_judged(about):
        marked = f"what differs from the training data (flag `outside`);\nnot judged: {missing}"
    return f"""`maknet predict` marks {marked}. The rules
compare {about["components"]} principal components of the pooled features with those of
{patients}; no features of single patients are stored. The thresholds allow
{about["false_alarms"]:.0%} false alarms on {tuning}; they judge {", ".join(about["judges"])}.
Images with left and right swapped are not found. False alarms on CT unlike the training data (other
scanners, matrix sizes, ages; native 512 x 512 pixels, if the training data had 128 x 128) are not
measured. A slice without a flag can still have wrong labels."""


def _data(data: Mapping[str, Any]) -> str:
    """The training data, as a Markdown list."""
    origin = data.get("origin") or {}
    kind, fingerprint = origin.get("kind") or "unknown", data.get("fingerprint")
    lines = [f"- Kind: {kind}; fingerprint {fingerprint}"]
    if kind == "phantom":
        lines.append(
            "- **A generated phantom, not patients**: the scores show that the software works and "
            "say nothing about real CT."
        )
    counts = [f"{count:,} {name}" for name, count in data.get("images", {}).items()]
    if counts:
        lines.append(f"- Images: {', '.join(counts)}")
    lines += _choice(data.get("choice") or {})
    if data.get("pseudo_labels"):
        lines.append("- Images with pseudo-labels of another network were added (noisy student).")
    for field in ("source", "citation", "licence"):
        value = origin.get(field) or "not recorded"
        lines.append(f"- {field.title()}: {value}")
    return "\n".join(lines)


def _choice(choice: Mapping[str, Any]) -> list[str]:
    """How the images were chosen, as far as it is recorded, see `records.Dataset.choice`."""
    lines = []
    if counts := choice.get("patients"):
        lines.append(f"- Patients: {', '.join(f'{n:,} {name}' for name, n in counts.items())}")
    if every := choice.get("every"):
        which = "all slices" if every == 1 else f"one slice of {every}, evenly spaced,"
        lines.append(f"- Choice of images: {which} of each volume, in all splits")
    if ways := choice.get("splits"):
        each = "; ".join(f"{way} ({count:,} cases)" for way, count in ways.items())
        lines.append(f"- Division into splits: {each}")
    return lines


def _scores(info: Mapping[str, Any]) -> str:
    """The table of all splits that were scored at this step."""
    metrics, images = info["metrics"], info["data"].get("images", {})
    tuning = info["config"]["data"]["val_split"]
    rows = []
    for name, values in metrics.items():
        # The metrics that the checkpoint was saved with; evaluated splits have their own name.
        tuned = name == "validation" and "examples" not in values
        split, shown = (tuning, f"tuning (split {tuning})") if tuned else (name, name)
        cells = [values.get(metric) for metric in _METRICS]
        cells = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        count = values.get("examples", images.get(split))
        rows.append([shown, *cells, "-" if count is None else f"{count:,}"])
    if not rows:
        return "Not evaluated before the export."
    header = ["set", "AUC", "F1", "precision", "recall", "images"]
    parts = [
        "Macro averages over the labels that have positives and negatives. The tuning split chose "
        "the checkpoint and the thresholds, so that its scores are optimistic.",
        console.markdown_table(header, rows),
    ]
    for split, values in metrics.items():
        if "intervals" in values:
            intervals = values["intervals"]
            parts.append(
                f"Set {split}. {console.describe_intervals(intervals)} The patients of a label are "
                "those who have it."
            )
            rows = console.interval_rows(intervals)
            parts.append(console.markdown_table(console.INTERVAL_HEADER, rows))
    return "\n\n".join(part.strip() for part in parts)
