"""Calibration: does a confidence of 0.8 mean that the label is present in 80 % of such images?

    python benchmarks/experiments/calibration.py --workdirs runs/maknet,runs/vgg16 --folder OUT
    python benchmarks/experiments/calibration.py --workdirs runs/maknet --quick  # four patients

Scores a split with each run and compares confidences with frequencies over all known labels:
reliability curve (FOLDER/reliability.png), expected calibration error in bins of equal width (Guo
et al. 2017, "On Calibration of Modern Neural Networks"), Brier score and log loss, for all labels,
per organ and per patient. In three forms: as trained; divided by one temperature; and with a slope
and an offset per organ (Platt scaling), which also corrects the shift that the class weights of the
loss cause. Both minimise the log loss on the tuning patients (--fit-split). If these patients are
scored themselves (the default), each fold of patients is scored with the fit to the others.

Intervals resample patients; that adds noise to the bins, so the interval of a small error lies
above it. Organs with fewer than 20 patients are listed apart. Resumes in --folder if interrupted.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

from benchmarks import harness
from benchmarks.experiments.organ_maps import LEAST_PATIENTS, rounded
from maknet_jax import console, files
from maknet_jax.cli import options
from maknet_jax.data import pipeline, records
from maknet_jax.errors import InputError
from maknet_jax.evaluation import bootstrap, metrics
from maknet_jax.explain import results
from maknet_jax.explain.network import network_name
from maknet_jax.runs import workdir
from maknet_jax.training import sharding, transfer

FULL: dict[str, Any] = {"patients": None, "folds": 5, "bins": 15}
QUICK = {"patients": 4, "folds": 2, "bins": 5}
FORMS = ("as trained", "temperature", "slope and offset per organ")
HEADER = ("network, form", "patients", "log loss", "Brier", "ECE", "bias", "ECE per patient, worst")


@dataclasses.dataclass(frozen=True)
class Scored:
    """The logits of a split.

    Attributes:
      logits: float64 `[N, K]`.
      labels: bool `[N, K]`.
      known: bool `[N, K]`.
      patients: str `[N]`.
    """

    logits: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    patients: np.ndarray

    def of(self, rows: np.ndarray) -> "Scored":
        """Some images, bool `[N]`."""
        return Scored(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def main(argv: Sequence[str] | None = None) -> None:
    """Scores, fits, prints the table, writes the JSON and the picture."""
    parser = harness.parser(__file__, __doc__, size=False, repeats=False)
    parser.add_argument(
        "--workdirs", type=harness.words, required=True, help="runs, comma-separated"
    )
    parser.add_argument("--data", help="prepared data set (default: the one trained on)")
    parser.add_argument("--split", default="val", help="default: val, the tuning patients")
    parser.add_argument("--fit-split", default="val", help="of the fits (default: val)")
    parser.add_argument("--folder", help="folder for logits and the picture (default: temporary)")
    parser.add_argument("--patients", type=options.count, help="maximal number of patients")
    parser.add_argument("--folds", type=options.count, help="if both splits are one (default: 5)")
    parser.add_argument("--bins", type=options.count, help="of the confidence (default: 15)")
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    document: dict[str, dict[str, Any]] = {}
    temperatures, curves = {}, {}
    with harness.run_folder(chosen.folder, "--folder") as folder:
        for number, path in enumerate(chosen.workdirs):
            run = workdir.open_run(path)
            scores = {
                split: logits_of(run, chosen, split, folder / f"{number}-{split}.npz")
                for split in dict.fromkeys((chosen.fit_split, chosen.split))
            }
            forms, temperature = calibrate(scores, chosen)
            names, name = run.vocabulary.names, network_name(run)
            document[name] = {
                form: summarize(scored, names, chosen.bins) for form, scored in forms.items()
            }
            temperatures[name] = temperature
            curves[name] = {form: values["all"]["curve"] for form, values in document[name].items()}
        draw(folder / "reliability.png", curves)
    report(argv, chosen, document, temperatures)


def logits_of(
    run: workdir.Run, chosen: argparse.Namespace, split: str, path: pathlib.Path
) -> Scored:
    """Scores a split, or reads the logits of an earlier call.

    Args:
      run: the network.
      chosen: the options.
      split: the split.
      path: the file of the logits.

    Raises:
      InputError: the file is of another network or data set.
    """
    dataset = records.open_dataset(chosen.data or run.data_path)
    records.check_size(dataset, run.size)
    if dataset.vocabulary.names != run.vocabulary.names:
        raise InputError(f"the labels of {dataset.path} differ from those of {run.source}")
    weights = transfer.digest(run.variables["params"], run.variables["batch_stats"])
    identity = [weights, dataset.fingerprint, split]
    if not path.exists():
        source = dataset.source(split)
        logits = []
        batch_size = sharding.round_up_to_devices(run.batch_size)
        with console.progress(f"score {split}", len(source)) as advance:
            for batch in pipeline.ordered_batches(source, batch_size=batch_size):
                real = batch["weight"] > 0
                logits.append(np.asarray(run.score(batch))[real])
                advance(int(real.sum()))
        examples = [source[k] for k in range(len(source))]
        arrays = {
            "logits": np.concatenate(logits),
            "labels": np.array([example.labels for example in examples]),
            "known": np.array([example.label_mask for example in examples]),
            "patients": np.array([example.meta["patient"] for example in examples]),
        }
        results.save(path, {"identity": identity}, arrays)
    metadata, arrays = results.load(path)
    if metadata["identity"] != identity:
        raise InputError(f"{path} holds logits of another run or data set: choose another --folder")
    scored = Scored(
        arrays["logits"].astype(np.float64),
        arrays["labels"] > 0,
        arrays["known"] > 0,
        arrays["patients"],
    )
    patients = np.unique(scored.patients)[: chosen.patients]
    return scored.of(np.isin(scored.patients, patients))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross entropy of logits and bool labels of one shape."""
    return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from 0.05 to 20 with the least log loss of logits / temperature."""
    best = optimize.minimize_scalar(
        lambda log: log_loss(logits / np.exp(log), labels), bounds=np.log([0.05, 20])
    )
    return float(np.exp(best.x))


def fit_line(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(slope, offset) with the least log loss; (1, 0) for labels of one class.

    A penalty of one thousandth of the squared distance from (1, 0) keeps separable labels finite.
    """
    if labels.all() or not labels.any():
        return 1.0, 0.0

    def loss(line: np.ndarray) -> float:
        distance = (line[0] - 1) ** 2 + line[1] ** 2
        return log_loss(line[0] * logits + line[1], labels) + 1e-3 * distance

    slope, offset = optimize.minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    return float(slope), float(offset)


def transformed(fit: Scored, scored: Scored) -> tuple[dict[str, np.ndarray], float]:
    """The logits of `scored` in each of `FORMS`, fitted to `fit`; and the temperature."""
    temperature = fit_temperature(fit.logits[fit.known], fit.labels[fit.known])
    lines = []
    for column in range(fit.logits.shape[1]):
        known = fit.known[:, column]
        lines.append(fit_line(fit.logits[known, column], fit.labels[known, column]))
    slopes, offsets = np.transpose(lines)
    values = (scored.logits, scored.logits / temperature, scored.logits * slopes + offsets)
    return dict(zip(FORMS, values, strict=True)), temperature


def calibrate(
    scores: Mapping[str, Scored], chosen: argparse.Namespace
) -> tuple[dict[str, Scored], float]:
    """(form -> scores of the split in this form, temperature from all patients of the fit split).

    Args:
      scores: by split.
      chosen: the options.

    Raises:
      InputError: there are fewer patients than folds.
    """
    scored, fit = scores[chosen.split], scores[chosen.fit_split]
    forms, temperature = transformed(fit, scored)
    if chosen.split == chosen.fit_split:
        patients = np.unique(scored.patients)
        if not 2 <= chosen.folds <= len(patients):
            raise InputError(
                f"--folds {chosen.folds} of {len(patients)} patients: at least 2 folds of at least "
                "one patient each are needed"
            )
        fold = np.random.default_rng(0).permutation(len(patients)) % chosen.folds
        of_image = fold[np.searchsorted(patients, scored.patients)]
        forms = {form: np.array(logits) for form, logits in forms.items()}
        for number in range(chosen.folds):
            part = of_image == number
            for form, logits in transformed(scored.of(~part), scored.of(part))[0].items():
                forms[form][part] = logits
    return (
        {form: dataclasses.replace(scored, logits=logits) for form, logits in forms.items()},
        temperature,
    )


def bin_sums(
    confidences: np.ndarray, labels: np.ndarray, groups: np.ndarray, bins: int
) -> np.ndarray:
    """Sums of (elements, confidence, label) per group and bin: `[G, bins, 3]`.

    Args:
      confidences: `[N]`.
      labels: `[N]`.
      groups: int `[N]`, from 0 to G - 1.
      bins: bins of equal width over [0, 1].
    """
    places = groups * bins + np.minimum((confidences * bins).astype(int), bins - 1)
    size = (int(groups.max(initial=-1)) + 1) * bins
    columns = (np.ones_like(confidences), confidences, labels)
    sums = [np.bincount(places, values, minlength=size) for values in columns]
    return np.stack(sums, axis=-1).reshape(-1, bins, 3)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """The expected calibration error of sums `[..., bins, 3]` of `bin_sums`: `[...]`."""
    gaps = np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1)
    return gaps / np.maximum(sums[..., 0].sum(axis=-1), 1)


def _values(scored: Scored, columns: Sequence[int], bins: int) -> dict[str, Any]:
    """Calibration over the known labels of some columns."""
    known = scored.known[:, columns]
    logits, labels = scored.logits[:, columns][known], scored.labels[:, columns][known]
    patients = np.broadcast_to(scored.patients[:, None], known.shape)[known]
    names, groups = np.unique(patients, return_inverse=True)
    confidences = metrics.sigmoid(logits).astype(np.float64)
    sums = bin_sums(confidences, labels, groups, bins)
    drawn = np.random.default_rng(0).integers(len(sums), size=(bootstrap.DRAWS, len(sums)))
    resampled = np.array([calibration_error(sums[rows].sum(axis=0)) for rows in drawn])
    total = sums.sum(axis=0)
    gaps = (sums[..., 1] - sums[..., 2]).sum(axis=-1) / sums[..., 0].sum(axis=-1)
    squares = np.bincount(groups, (confidences - labels) ** 2) / np.bincount(groups)
    return {
        "patients": len(names),
        "elements": int(known.sum()),
        "log_loss": log_loss(logits, labels),
        "brier": float(np.mean((confidences - labels) ** 2)),
        "ece": [
            float(calibration_error(total)),
            *map(float, np.quantile(resampled, [0.025, 0.975])),
        ],
        "bias": float(np.mean(confidences) - np.mean(labels)),
        "curve": [
            [int(count), confidence / count, label / count]
            for count, confidence, label in total.tolist()
            if count
        ],
        "by_patient": {
            name: [round(float(value), 4) for value in values]
            for name, *values in zip(
                names.tolist(), calibration_error(sums), gaps, squares, strict=True
            )
        },
    }


def summarize(scored: Scored, names: Sequence[str], bins: int) -> dict[str, Any]:
    """Calibration over "all" labels and by organ.

    Returns:
      `all` and each organ with known labels: patients, elements, log_loss, brier, ece (with its
      interval) and bias (mean confidence minus frequency); `all` also has curve (elements, mean
      confidence, frequency per bin) and by_patient (ECE, bias and Brier score of each patient).
    """
    result = {"all": _values(scored, range(len(names)), bins)}
    for column, name in enumerate(names):
        if scored.known[:, column].any():
            result[name] = _values(scored, [column], bins)
            del result[name]["by_patient"], result[name]["curve"]
    return result


def draw(path: pathlib.Path, curves: Mapping[str, Mapping[str, list[list[float]]]]) -> None:
    """Writes the reliability curves: a panel per network, a line per form.

    Args:
      path: the PNG.
      curves: network -> form -> (elements, mean confidence, frequency) per bin.
    """
    figure = Figure(figsize=(4.4 * len(curves), 6), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, height_ratios=(3, 1), sharex=True)
    for (name, forms), upper, lower in zip(curves.items(), *panels, strict=True):
        upper.plot([0, 1], [0, 1], color="#999", linewidth=1)
        for form, rows in forms.items():
            counts, confidences, frequencies = np.transpose(rows)
            upper.plot(confidences, frequencies, "o-", markersize=3, label=form)
            lower.plot(confidences, counts, "o-", markersize=3)
        upper.set_title(name, fontsize=9)
        upper.set_ylabel("share of labels present")
        upper.legend(fontsize=8)
        lower.set_yscale("log")
        lower.set_ylabel("labels")
        lower.set_xlabel("confidence")
    with files.write_whole(path, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": files.PNG_SOFTWARE})


def report(
    argv: Sequence[str] | None,
    chosen: argparse.Namespace,
    document: Mapping[str, Mapping[str, Any]],
    temperatures: Mapping[str, float],
) -> None:
    """Prints the table and writes the JSON."""
    rows = {
        f"{name}, {form}": values
        for name, forms in document.items()
        for form, values in forms.items()
    }
    fitted = f"fitted on {chosen.fit_split}"
    if chosen.split == chosen.fit_split:
        fitted = f"each of {chosen.folds} folds of patients fitted on the others"
    notes = [
        f"split {chosen.split}, {fitted}; {chosen.bins} bins; known labels only",
        "temperature of all patients of the fit: "
        + ", ".join(f"{name} {value:.2f}" for name, value in temperatures.items()),
    ]
    for title, values in rows.items():
        organs = [organ for organ in values if organ != "all"]
        apart = [organ for organ in organs if values[organ]["patients"] < LEAST_PATIENTS]
        ordered = [organ for organ in organs if organ not in apart] + apart
        text = ", ".join(
            f"{organ}{' (apart)' * (organ in apart)} {values[organ]['ece'][0]:.3f}"
            for organ in ordered
        )
        notes.append(f"{title}: ECE of {text}")
    cells = [[title, *_cells(values["all"])] for title, values in rows.items()]
    content = {"temperatures": temperatures, **rows}
    harness.report(__file__, argv, chosen, HEADER, cells, notes, rounded(content))


def _cells(values: Mapping[str, Any]) -> list[Any]:
    worst = max(values["by_patient"].items(), key=lambda item: item[1][0])
    return [
        values["patients"],
        f"{values['log_loss']:.3f}",
        f"{values['brier']:.4f}",
        console.format_interval(values["ece"]),
        f"{values['bias']:+.3f}",
        f"{worst[1][0]:.3f} ({worst[0]})",
    ]


if __name__ == "__main__":
    harness.run(main)
