"""The whole pipeline on real CT: a torso whose slices are labelled with the organs they show.

Held-out slices come in contiguous blocks along z, and no training or validation slice lies within
two slices of them, so that no channel is shared.
"""

import csv
import json

import jax
import nibabel
import numpy as np
import pytest

from maknet_jax import evaluate, predict, prepare, pseudo_label, train
from maknet_jax.data import pseudo_labels
from maknet_jax.figures import charts
from maknet_jax.runs import config

# TotalSegmentator's label values; paired organs and similar neighbours share a name.
ORGANS = {
    "spleen": (1,),
    "right kidney": (2,),
    "left kidney": (3,),
    "gallbladder": (4,),
    "liver": (5,),
    "stomach": (6,),
    "pancreas": (7,),
    "lung": (10, 11, 14),
    "small bowel": (18,),
    "duodenum": (19,),
    "colon": (20,),
    "urinary bladder": (21,),
    "sacrum": (25,),
    "lumbar": (27, 28, 29, 30, 31),
    "thoracic spine": (32, 33),
    "aorta": (52,),
    "vena cava": (63,),
    "femur": (75, 76),
    "pelvic bone": (77, 78),
    "gluteus maximus": (80, 81),
    "gluteus minimus": (84, 85),
    "paraspinal muscle": (86, 87),
    "psoas muscle": (88, 89),
}
SLICES, BLOCK, VOXELS = 112, 8, 20
# For only 46 slices: milder noise and a lower, decaying learning rate than the teacher's.
RECIPE = (
    "augment.rotation_probability=0.7",
    "augment.rotation_degrees=5",
    "augment.grayscale_probability=0.3",
    "augment.crop_probability=0.8",
    "augment.crop_scale=0.85,1.0",
    "optimizer.learning_rate=0.003",
    "optimizer.decay_from=0.3",
)


def split_of(z):
    """Four blocks of 24 mm are held out; one in eight of the other slices validates."""
    if z // BLOCK in (1, 4, 7, 10):
        return "test"
    return "val" if z % (3 * BLOCK) in (3, 2 * BLOCK + 3) else "train"


def write_table(path, ct, organs):
    """Writes the torso as a table for `prepare table`.

    The blocks of a split count as a patient of their own: one volume in two splits is refused.
    """
    present = {
        name: np.isin(organs, values).sum(axis=(0, 1)) >= VOXELS for name, values in ORGANS.items()
    }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "labels", "split", "slice", "patient"))
        for z in range(SLICES):
            near = {split_of(min(max(z + step, 0), SLICES - 1)) for step in (-2, -1, 1, 2)}
            if split_of(z) == "test" or "test" not in near:
                labels = "|".join(name for name in ORGANS if present[name][z])
                writer.writerow((ct, labels, split_of(z), z, f"blocks of {split_of(z)}"))


@pytest.fixture(scope="module")
def torso(shared_data, tmp_path_factory):
    """(prepared data, path of the CT, organ map) of the real torso."""
    folder = tmp_path_factory.mktemp("torso")
    source = shared_data / "nifti" / "torso_112"
    organs = np.asarray(nibabel.load(source / "example_seg_fast_force_split.nii.gz").dataobj)
    write_table(folder / "torso.csv", source / "example_ct.nii.gz", organs.astype(int))
    prepare.prepare_table(folder / "torso.csv", folder / "shards", size=32)
    return folder / "shards", source / "example_ct.nii.gz", organs


def run(name, torso, folder, *overrides):
    """Trains on one device and returns the metrics of the held-out blocks."""
    settings = config.load(
        name,
        [
            f"data.path={torso[0]}",
            "data.size=32",
            "data.batch_size=16",
            "evaluate_every=1000",
            *overrides,
        ],
    )
    train.train(settings, folder, devices=jax.devices()[:1])
    return evaluate.evaluate(folder, splits=["test"], checkpoint="last")["splits"]["test"]


def check_along_z(torso, folder):
    """Checks that organs are predicted where the organ map shows them, in order along z."""
    summary = predict.predict(
        folder / "run", torso[1], folder / "labels.csv", as_json=True, charts=True
    )
    full = json.loads((folder / "labels.json").read_text())
    confidences = np.asarray(full["series"][0]["confidences"])
    z = np.arange(SLICES)
    middle = {}
    for name in ("liver", "lumbar", "urinary bladder", "femur"):
        values = confidences[:, full["labels"].index(name)]
        shown = np.isin(torso[2], ORGANS[name]).sum(axis=(0, 1))[::-1] >= VOXELS  # head to feet
        assert values[shown].mean() > values[~shown].mean() + 0.2, name
        middle[name] = (z * values**2).sum() / (values**2).sum()
    assert middle["liver"] < middle["lumbar"] < middle["urinary bladder"] < middle["femur"]
    assert summary["slices"] == SLICES
    assert (folder / "labels.000.png").stat().st_size > 10_000


def test_a_short_training_on_the_torso(torso, tmp_path):
    metrics = run("smoke", torso, tmp_path / "run", "epochs=80", *RECIPE)
    assert metrics["auc"] >= 0.9
    assert metrics["labels_evaluated"] >= 15
    check_along_z(torso, tmp_path)


@pytest.mark.slow  # six trainings
def test_the_torso_network_against_a_linear_model(torso, tmp_path):
    """Each with its own recipe, on seeds that were not used to choose it.

    At a threshold of 0.5 the network is ahead. In AUC it is not reliably so: along one patient the
    pixels change almost linearly and both are near 1, so AUC is only printed.
    """
    network, linear = [], []
    for seed in (2, 3, 4):
        name = f"seed={seed}"
        network.append(run("smoke", torso, tmp_path / f"n{seed}", name, "epochs=300", *RECIPE))
        linear.append(run("linear", torso, tmp_path / f"l{seed}", name))
    shown = {
        metric: [[row[metric] for row in rows] for rows in (network, linear)]
        for metric in ("auc", "f1_at_0.5")
    }
    for metric, (ours, theirs) in shown.items():
        print(f"held-out {metric}: MAKNet {np.round(ours, 4)}, linear {np.round(theirs, 4)}")
    assert min(shown["auc"][0]) >= 0.95
    assert np.mean(shown["f1_at_0.5"][0]) > np.mean(shown["f1_at_0.5"][1])


@pytest.mark.slow  # a training, and three sources of real CT
def test_real_ct_is_pseudo_labelled(torso, shared_data, tmp_path):
    """A teacher of the labelled torso labels unseen CT; the result is drawn along z."""
    run("smoke", torso, tmp_path / "run", "epochs=120", *RECIPE)
    sources = {
        "torso": shared_data / "nifti" / "torso_112" / "example_ct.nii.gz",
        "liver": shared_data / "dicom" / "liver_j2k_20",
        "deeplesion": shared_data / "deeplesion" / "Images_png",
    }
    for name, path in sources.items():
        prepare.prepare_dicom(
            path, tmp_path / name, salt_file=tmp_path / "salt", min_slices=10, size=32
        )
        out = tmp_path / f"pseudo-{name}"
        result = pseudo_label.pseudo_label(tmp_path / "run", tmp_path / name, out)
        rows = np.concatenate(
            [pseudo_labels.read_rows(out / s["file"], s["sha256"]) for s in result["shards"]]
        )
        shown = np.zeros((result["images"], len(result["labels"])))
        for row in rows:
            selected = row["labels"] >= 0
            shown[row["index"], row["labels"][selected]] = row["confidences"][selected]
        title = f"{name}: pseudo-labels of a teacher of the torso"
        charts.write_label_chart(
            tmp_path / f"{name}.png", shown, shown > 0, result["labels"], title=title
        )
        column = {label: shown[:, k] for k, label in enumerate(result["labels"])}
        # This teacher of one patient does not recognise the liver of another one with the arms
        # down, so that its labels are drawn but not asserted.
        assert result["images"] == len(shown) and (tmp_path / f"{name}.png").stat().st_size > 10_000
        if name == "torso":
            z = np.arange(len(shown))
            centre = {k: (z * column[k]).sum() / column[k].sum() for k in ("liver", "femur")}
            assert centre["liver"] < centre["femur"]  # from head to feet
