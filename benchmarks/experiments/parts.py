"""What each part of MAKNet is worth: its components replaced by their plain counterparts.

    python benchmarks/experiments/parts.py --folder runs/patients --rate 0.003 --epochs 12
    python benchmarks/experiments/parts.py --folder runs/patients --choices
    python benchmarks/experiments/parts.py --folder runs/patients --report  # finished runs only
    python benchmarks/experiments/parts.py --quick  # a few steps, only to see it run

One at a time: MixPool by maximum pooling, global concatenate pooling by global average pooling,
CBAM and the score propagation layer by nothing, and MAKConv by full 3 x 3 convolutions with fewer
channels, so that the parameters are equal to 0.1 %. Data, splits and intervals are those of
table1_patients.py, whose run of MAKNet is the reference; the recipe is the one chosen there.

With --choices, instead: what the paper leaves open, at equal parameters (0.5 %), on the tuning
patients, because an architecture is chosen there. The stride of the stem, a thin block before the
others, more channels in the first blocks, and channels that grow more evenly.

Resumes in --folder. For results see benchmarks/RESULTS.md. Needs OpenKBP (data/README.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.experiments import patient_metrics as metrics
from benchmarks.experiments import patients
from maknet_jax import console
from maknet_jax.data import records

REFERENCE = "maknet"
# Title of the run -> (description, options of the model).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("MAKNet", {}),
    "maknet-no-mixpool": ("maximum pooling for MixPool", {"plain": ("mixpool",)}),
    "maknet-no-gcp": ("average for concatenate pooling", {"plain": ("gcp",)}),
    "maknet-no-cbam": ("without CBAM", {"plain": ("cbam",)}),
    "maknet-no-spl": ("without score propagation", {"plain": ("spl",)}),
    "maknet-full-kernels": (
        "3 x 3 convolutions for MAKConv",
        {"plain": ("makconv",), "growth_rates": (9, 18, 68, 100)},
    ),
}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("MAKNet", {}),
    "maknet-stride-2": ("stride 2 in the stem", {"stem_stride": 2}),
    "maknet-five-blocks": (
        "stride 2, and a thin block before the others",
        {
            "stem": 16,
            "stem_stride": 2,
            "blocks": (3, 3, 3, 6, 6),
            "growth_rates": (8, 16, 32, 112, 160),
            "widths": (32, 64, 128, 256, 384),
        },
    ),
    "maknet-early-channels": (
        "more channels in the first blocks",
        {"stem": 64, "growth_rates": (32, 48, 112, 152), "widths": (96, 160, 256, 384)},
    ),
    "maknet-even-channels": (
        "channels that grow evenly",
        {"growth_rates": (32, 64, 112, 128), "widths": (96, 192, 320, 528)},
    ),
}
FULL: dict[str, Any] = {"size": 64, "seeds": [0, 1], "rate": 0.003, "epochs": 12.0}
QUICK: dict[str, Any] = {"seeds": [0]}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table and writes the JSON."""
    parser = patients.parser(__file__, __doc__, seeds="0,1")
    parser.add_argument("--rate", type=harness.positive, help="learning rate (default: 0.003)")
    parser.add_argument("--epochs", type=harness.positive, help="default: 12")
    parser.add_argument(
        "--choices", action="store_true", help="what the paper leaves open, on tuning patients"
    )
    chosen = harness.parse(parser, argv, full=FULL, quick=QUICK)
    recipe = patients.Recipe(chosen.rate, chosen.epochs)
    with harness.run_folder(chosen.folder, "--folder") as folder:
        runs = patients.Runs(folder, chosen.patients, train=not chosen.report, quick=chosen.quick)
        variants = CHOICES if chosen.choices else VARIANTS
        split = patients.TUNING if chosen.choices else patients.VALIDATION
        results = measure(runs, variants, recipe, chosen.seeds, chosen.size, split)
    rows = [
        [
            variants[row["variant"]][0],
            len(row["seeds"]),
            console.format_interval(row["auc"]),
            console.format_interval(row["f1"]),
            *(
                console.format_interval(row[f"{metric}_difference"], signed=True)
                if f"{metric}_difference" in row
                else ""
                for metric in ("auc", "f1")
            ),
        ]
        for row in results["variants"]
    ]
    notes = [
        f"{chosen.size} x {chosen.size} pixels, seeds {', '.join(map(str, chosen.seeds))}, "
        f"learning rate {recipe.rate:g}, {recipe.epochs:g} epochs; averages over the organs that "
        f"at least {metrics.ENOUGH} {'tuning' if chosen.choices else 'validation'} patients have; "
        "differences: MAKNet minus variant",
        *([f"missing runs: {', '.join(runs.missing)}"] * bool(runs.missing)),
        *(["QUICK FORM: a few steps: the numbers are meaningless"] * chosen.quick),
    ]
    header = ["network", "seeds", "AUC", "F1", "MAKNet is better by (AUC)", "(F1)"]
    harness.report(__file__, argv, chosen, header, rows, notes, results)


def measure(
    runs: patients.Runs,
    variants: Mapping[str, tuple[str, dict[str, Any]]],
    recipe: patients.Recipe,
    seeds: Sequence[int],
    size: int,
    split: str,
) -> dict[str, Any]:
    """Trains and scores variants.

    Returns:
      The entries of the JSON: labels, recipe, variants and missing.
    """
    draws: dict[str, dict[int, metrics.Draws]] = {}
    rows: list[dict[str, Any]] = []
    for variant, (_, options) in variants.items():
        scores = runs.by_seed(
            REFERENCE, recipe, size=size, seeds=seeds, split=split, title=variant, **options
        )
        if not scores:
            continue
        first = next(iter(scores.values()))
        weights, enough = metrics.draw_weights(first.patients), first.enough()
        draws[variant] = {
            seed: metrics.metric_draws(scored, weights) for seed, scored in scores.items()
        }
        row = {"variant": variant, "seeds": list(scores)}
        row |= metrics.averages(list(draws[variant].values()), enough)
        if variant != REFERENCE and REFERENCE in draws:
            row |= {
                f"{gain['metric']}_difference": gain["difference"]
                for gain in metrics.differences(draws[REFERENCE], draws[variant], enough)
                if gain["organs"] == metrics.ENOUGH_TITLE
            }
        rows.append(row)
    labels = records.open_dataset(runs.data(size)).vocabulary.names
    document = {"labels": labels, "split": split, "recipe": recipe}
    return document | {"variants": rows, "missing": runs.missing}


if __name__ == "__main__":
    harness.run(main)
