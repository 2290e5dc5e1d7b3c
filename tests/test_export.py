"""`maknet export`: the content of a bundle, its results, and the network in other programs."""

import json
import re
import shutil
import subprocess
import sys

import jax
import lesion_runs
import numpy as np
import pytest
import runs
import toy
import yaml

import maknet_jax
from maknet_jax import cli, evaluate, export, files, pseudo_label, train
from maknet_jax.errors import InputError, Stopped
from maknet_jax.runs import bundle, card, stablehlo, workdir
from maknet_jax.runs import config as configs

# Another program: neither this package nor Flax can be imported. Runs the snippet of the README,
# then batches of 1 and 5.
ELSEWHERE = """
import sys
sys.modules["maknet_jax"] = sys.modules["flax"] = None
exec(open("snippet.py").read())
stored = np.load(sys.argv[1])
for count in (1, 5):
    more = [stored["boxes"][:count]] if "boxes" in stored else []
    outputs = network.call(weights, stored["images"][:count], *more)
    for name in ("logits", "features"):
        error = np.abs(np.asarray(outputs[name]) - stored[name][:count]).max()
        assert error < 1e-5, (count, name, error)
assert confidences.shape == (2, stored["logits"].shape[1])
print(network.platforms)
"""


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of the run, evaluated."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, folder)
    evaluate.evaluate(folder)
    return folder


@pytest.fixture(scope="module")
def exported(evaluated, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "torso"
    export.export(evaluated, out, name="Torso", license_name="cc-by-4.0", zipped=True)
    return out


def info_of(folder):
    return json.loads((folder / bundle.INFO).read_text())


def run_elsewhere(folder, arrays, tmp_path):
    """Runs ELSEWHERE in a bundle; returns what it prints."""
    np.savez(tmp_path / "arrays.npz", **arrays)
    (snippet,) = re.findall(r"```python\n(import jax.export.*?)```", card_of(folder), re.S)
    work = shutil.copytree(folder, tmp_path / "elsewhere")
    (work / "snippet.py").write_text(snippet)
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "arrays.npz")],
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def card_of(folder):
    return (folder / bundle.CARD).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def images(shards):
    source = shards.source("test")
    return np.stack([source[number].image for number in range(5)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_program_runs_the_network(evaluated, images, tmp_path, dtype):
    export.export(evaluated, tmp_path / "torso", dtype=dtype)
    model = maknet_jax.load(tmp_path / "torso")
    arrays = {"images": images, "logits": model.logits(images), "features": model.features(images)}
    assert run_elsewhere(tmp_path / "torso", arrays, tmp_path).strip() == "('cpu', 'cuda', 'tpu')"


@pytest.mark.parametrize("name", ["linear", "vgg16", "resnet18"])
def test_other_networks_run_elsewhere(trained, images, tmp_path, name):
    run = workdir.open_run(trained)
    changes = [f"model.options.{key}={value}" for key, value in {"edge": 4}.items()]
    config = configs.load(name, ["data.size=32", *(changes if name == "linear" else [])])
    from maknet_jax.runs import build
    from maknet_jax.training import transfer

    model = build.build_model(config, 4)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    stored = bundle.pack(variables["params"], variables.get("batch_stats", {}), "float32")
    payload, _ = stablehlo.export_network(config, 4, transfer.named(stored))
    called = jax.export.deserialize(bytearray(payload)).call(transfer.named(stored), images)
    expected = model.apply(variables, run.to_input(images), train=False)
    np.testing.assert_allclose(called["logits"], expected.logits, atol=1e-5)
    np.testing.assert_allclose(called["features"], expected.features, atol=1e-5)


def test_a_lesanet_takes_boxes_elsewhere(phantom, tmp_path):
    data = lesion_runs.write(phantom, tmp_path / "data", 32)
    options = {"stem": 8, "blocks": (1, 1, 1), "growth_rates": (8, 8, 8), "widths": (8, 8, 8)}
    config = configs.load(
        "lesanet", [f"data.path={data}", "data.size=32", "data.batch_size=8", "epochs=0.2"]
    ).to_dict()
    config["model"]["options"] |= {"trunk": "maknet", "trunk_options": options, "units": 16}
    config["loss"] |= {"triplets": 50, "rhem_draws": 50}
    train.train(configs.from_json(config), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "lesanet", checkpoint="last")
    info = info_of(tmp_path / "lesanet")
    assert info["preprocessing"]["slice_distance_mm"] == 2.0
    assert info["stablehlo"]["inputs"][2] == "boxes float32 [b, 4]"
    run = workdir.open_run(tmp_path / "lesanet")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(-1000, 400, (8, 32, 32, 3)).astype(np.int16),
        "box": np.float32([[k, 2, k + 9, 20] for k in range(8)]),
    }
    logits, features = map(np.asarray, run.score_with_features(batch))
    arrays = {"images": batch["image"], "boxes": batch["box"], "logits": logits}
    run_elsewhere(tmp_path / "lesanet", arrays | {"features": features}, tmp_path)
    with pytest.raises(InputError, match="box in addition to the image"):
        maknet_jax.load(tmp_path / "lesanet").logits(batch["image"])


def test_the_form_of_makconv_is_recorded_and_an_explicit_one_preserved():
    for form, expected in (("auto", "fused"), ("split", "split")):
        config = configs.load("smoke", [f"model.options.form={form}", "precision=bfloat16"])
        exported = stablehlo.exported_config(config)
        assert (exported.model.options.form, exported.precision) == (expected, "float32")
    values = configs.load("lesanet").to_dict()
    values["model"]["options"] |= {"trunk": "maknet"}
    config = stablehlo.exported_config(configs.from_json(values))
    assert config.model.options.trunk_options.form == "fused"


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float16", 1e-3)])
def test_confidences_equal_those_of_the_workdir(evaluated, phantom, tmp_path, dtype, tolerance):
    summary = export.export(evaluated, tmp_path / dtype, dtype=dtype)
    expected = maknet_jax.load(evaluated).predict(phantom["dicom"])
    result = maknet_jax.load(tmp_path / dtype).predict(phantom["dicom"])
    np.testing.assert_allclose(result.confidences, expected.confidences, atol=tolerance)
    if dtype == "float32":
        assert result.labels == expected.labels
    run = workdir.open_run(tmp_path / dtype)
    leaves = jax.tree.leaves(run.variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    stored = summary["bytes"][bundle.WEIGHTS]
    whole = sum(leaf.nbytes for leaf in leaves)
    assert whole < stored if dtype == "float32" else stored < 0.9 * whole


def test_a_bundle_describes_its_network_and_training_data(exported, evaluated, shards):
    info = info_of(exported)
    run = workdir.open_run(evaluated)
    assert info["name"] == "Torso" and info["checkpoint"]["step"] == run.step
    assert info["data"]["origin"]["kind"] == "phantom"
    assert info["data"]["fingerprint"] == shards.fingerprint
    assert info["data"]["images"]["train"] == shards.split("train")["count"]
    assert info["preprocessing"]["size"] == 32
    assert info["out_of_domain"]["training_slices"] == shards.split("train")["count"]
    summary = files.read_json(evaluated / "evaluation" / "summary_test_hand.json")
    for split in ("test", "hand"):
        assert info["metrics"][split]["auc"] == summary["splits"][split]["auc"]
    assert info["metrics"]["validation"]["auc"] > 0
    assert [label["name"] for label in info["labels"]] == list(run.vocabulary.names)


def test_the_network_names_no_files_of_the_exporting_machine(exported):
    content = (exported / "network.stablehlo").read_bytes()
    assert b"site-packages" not in content and b"/maknet_jax/" not in content


def test_the_card_has_the_form_of_the_hub(exported):
    _, header, text = card_of(exported).split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "maknet-jax"
    assert "roc_auc" in header["metrics"] and "computed-tomography" in header["tags"]
    info = info_of(exported)
    for part in (
        "# Torso",
        "not a medical device",
        "generated phantom, not patients",
        "## Intended use and limits",
        "Licence: not recorded",
        f"| test | {info['metrics']['test']['auc']:.3f} ",
        f"| tuning (split val) | {info['metrics']['validation']['auc']:.3f} ",
        f"| {info['data']['images']['val']} |",
        info["labels"][0]["name"],
        info["preprocessing"]["crop"],
    ):
        assert part in text, part


def test_citation_licences_and_statistics_travel_with_the_bundle(evaluated, tmp_path, shards):
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards.path, data)
    info = files.read_json(data / "dataset.json")
    origin = {"licence": "CC BY-NC 3.0", "citation": "Doe, 2020", "source": "Doe's CT"}
    files.write_json(data / "dataset.json", info | {"about": origin})
    shutil.copytree(evaluated, folder)
    export.export(folder, tmp_path / "out", data=data)
    written = info_of(tmp_path / "out")
    assert written["data"]["origin"] == {"kind": "deeplesion"} | origin
    assert workdir.open_run(tmp_path / "out").trained_on == "Doe's CT"
    statistics = workdir.open_run(tmp_path / "out").domain
    assert statistics.about == written["out_of_domain"]
    for name, array in workdir.open_run(folder).domain.arrays.items():
        np.testing.assert_array_equal(statistics.arrays[name], array)
    card = card_of(tmp_path / "out")
    assert "- Licence: CC BY-NC 3.0" in card and "- Citation: Doe, 2020" in card
    other = toy.write(tmp_path / "other")
    with pytest.raises(InputError, match="other is not the data that .* was trained on"):
        export.export(folder, tmp_path / "again", data=other)


def test_scores_of_other_weights_are_left_out(evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "run")
    assert (folder / "evaluation" / "summary_test_hand.json").is_file()
    for path in (folder / "evaluation").glob("summary_*.json"):  # other tests may have scored too
        files.write_json(path, files.read_json(path) | {"step": 1})
    export.export(folder, tmp_path / "out")
    assert list(info_of(tmp_path / "out")["metrics"]) == ["validation"]


def test_validation_scores_of_an_earlier_step_are_left_out(tmp_path, monkeypatch):
    data, folder = toy.write(tmp_path / "data"), tmp_path / "run"
    with monkeypatch.context() as patch:
        runs.signal_after(patch, 11)  # validated at 8, saved at 11
        with pytest.raises(Stopped, match="step 11 of 40"):
            train.train(toy.config(data, "linear"), folder)
    for checkpoint, step, splits in (("best", 8, ["validation"]), ("last", 11, [])):
        export.export(folder, tmp_path / checkpoint, checkpoint=checkpoint)
        info = info_of(tmp_path / checkpoint)
        assert (info["checkpoint"]["step"], list(info["metrics"])) == (step, splits)
    train.train(toy.config(data, "linear"), folder)
    export.export(folder, tmp_path / "end", checkpoint="last")
    assert list(info_of(tmp_path / "end")["metrics"]) == ["validation"]


def test_the_title_is_the_full_name_of_the_folder(evaluated, tmp_path, monkeypatch):
    folder = shutil.copytree(evaluated, tmp_path / "rate-0.01")
    export.export(folder, tmp_path / "released" / "torso-1.0", zipped=True)
    assert info_of(tmp_path / "released" / "torso-1.0")["name"] == "rate-0.01"
    monkeypatch.setattr(bundle, "__file__", str(tmp_path / "runs" / "bundle.py"))
    for form in ("folder", "zip"):
        assert list(bundle.released()) == ["torso-1.0"], form
        shutil.rmtree(tmp_path / "released" / "torso-1.0", ignore_errors=True)


def test_the_training_data_may_be_missing(evaluated, tmp_path, capsys):
    folder = shutil.copytree(evaluated, tmp_path / "run")
    info = files.read_json(folder / "dataset.json")
    files.write_json(folder / "dataset.json", info | {"path": str(tmp_path / "gone")})
    export.export(folder, tmp_path / "out")
    stderr = capsys.readouterr().err
    assert "number of images" in stderr and "origin" not in stderr
    data = info_of(tmp_path / "out")["data"]
    assert "images" not in data and data["origin"]["kind"] == "phantom"  # the run says so
    assert "Kind: phantom" in card_of(tmp_path / "out")


def test_a_bundle_is_exported_again_in_another_dtype(exported, tmp_path):
    export.export(exported, tmp_path / "half", dtype="float16")
    one, two = info_of(exported), info_of(tmp_path / "half")
    for field in ("data", "metrics", "labels", "thresholds", "preprocessing"):
        assert one[field] == two[field]
    assert two["weights"]["dtype"] == "float16"
    export.export(tmp_path / "half", tmp_path / "again")
    for folder in ("half", "again"):
        assert info_of(tmp_path / folder)["checkpoint"] == one["checkpoint"]
        assert info_of(tmp_path / folder)["name"] == "Torso"
        run = workdir.open_run(tmp_path / folder)
        assert run.trained_on == workdir.open_run(exported).trained_on
        title = "---\n\n# Torso\n"
        header, text = card_of(tmp_path / folder).split(title)
        assert yaml.safe_load(header.strip("-\n"))["license"] == "cc-by-4.0"
        first = card_of(exported).split(title)[1]
        named = [text for text in (f"--model {exported.name} ", f'load("{exported.name}")')]
        assert all(name in first for name in named)
        for name in named:
            first = first.replace(name, name.replace(exported.name, folder))
        assert text.replace(f"`{folder}`", f"`{exported.name}`") == first
    more = {"name": "New", "license_name": "mit", "note": "Sees only **left** lungs."}
    export.export(exported, tmp_path / "new", **more)
    assert info_of(tmp_path / "new")["name"] == "New"
    export.export(tmp_path / "new", tmp_path / "newer")  # keeps the note
    for folder in ("new", "newer"):
        assert info_of(tmp_path / folder)["note"] in card_of(tmp_path / folder)
    assert card.license_of(bundle.read_card(tmp_path / "new")) == "mit"
    with pytest.raises(InputError, match="itself"):
        export.export(tmp_path / "half", tmp_path / "half", overwrite=True)


def test_the_command_writes_a_folder_and_a_zip(evaluated, tmp_path, capsys):
    out = tmp_path / "torso"
    argv = ["export", str(evaluated), "--out", f"{out}/", "--zip", "--license", "mit"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for part in ("scores of: validation", "hand", "model.safetensors", "torso.zip"):
        assert part in printed
    assert yaml.safe_load(card_of(out).split("---\n")[1])["license"] == "mit"
    for again, code in ((argv, 2), ([*argv, "--overwrite"], 0)):
        assert cli.main(again) == code
    assert cli.main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert "nowhere not found" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_every_verb_that_takes_a_workdir_takes_a_bundle(
    exported, evaluated, shards, phantom, images, tmp_path
):
    data, archive = str(shards.path), f"{exported}.zip"

    def maknet(verb, *argv):
        return cli.main([verb, *map(str, argv)])

    csv, scans = tmp_path / "labels.csv", sorted(phantom["dicom"].iterdir())[0]
    for number, model in enumerate((exported, archive, evaluated)):
        assert maknet("predict", scans, "--model", model, "--out", tmp_path / f"{number}.csv") == 0
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "1.csv").read_bytes()
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    assert maknet("predict", scans, "--workdir", exported, "--out", csv) == 0  # the older name
    out = tmp_path / "evaluated"
    assert maknet("evaluate", "--model", exported, "--data", data, "--out", out) == 0
    summary = files.read_json(out / "summary_test_hand.json")
    expected = files.read_json(evaluated / "evaluation" / "summary_test_hand.json")
    assert summary["splits"]["test"]["auc"] == pytest.approx(expected["splits"]["test"]["auc"])
    few = ("--split", "test", "--data", data, "--limit", "2", "--steps", "2")
    for verb in ("attribute", "perturb"):
        more = ("--refine", "0") if verb == "attribute" else ("--strategy", "random")
        argv = (verb, "--model", archive, *few, *more, "--out", tmp_path / verb)
        assert maknet(*argv) == 0
        assert files.read_json(tmp_path / verb / "summary.json")["images"] == 2
    argv = ("report", exported, "--data", data, "--out", tmp_path / "report", "--cases", "1")
    assert maknet(*argv) == 0
    labelled = []
    for name, teacher in (("bundle", archive), ("workdir", evaluated)):
        argv = ("--model", teacher, "--records", data, "--split", "test", "--threshold", "0.2")
        assert maknet("pseudo-label", *argv, "--out", tmp_path / name) == 0
        labelled.append(files.read_json(tmp_path / name / "pseudo.json"))
    assert labelled[0]["shards"] == labelled[1]["shards"]
    assert labelled[0]["teacher_digest"] == labelled[1]["teacher_digest"]
    written = {*bundle.contained(info_of(exported)), bundle.INFO}
    assert {path.name for path in exported.iterdir()} == written


@pytest.mark.parametrize(
    "argv, says",
    [
        (("evaluate", "--model"), "is a bundle, which is read-only: add --out"),
        (("attribute", "--split", "test", "--out", "x", "--model"), "contains no data: add --data"),
        (("report",), "is a bundle, which is read-only: add --out"),
        (("predict", ".", "--out", "x.csv", "--checkpoint", "last", "--model"), "best checkpoint"),
    ],
)
def test_the_error_names_what_a_bundle_lacks(
    exported, phantom, tmp_path, monkeypatch, capsys, argv, says
):
    scans = sorted(phantom["dicom"].iterdir())[0]
    monkeypatch.chdir(shutil.copytree(scans, tmp_path / "scans"))
    assert cli.main([*argv, str(exported)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_pseudo_labels_resume_with_the_bundle_of_their_teacher(
    exported, evaluated, shards, tmp_path
):
    options = {"split": "test", "threshold": 0.2}
    pseudo_label.pseudo_label(evaluated, shards.path, tmp_path / "out", **options)
    again = pseudo_label.pseudo_label(exported, shards.path, tmp_path / "out", **options)
    assert again["teacher_step"] == workdir.open_run(evaluated).step
