"""Moved and renamed workdirs keep working: results and runs are compared by digests."""

import shutil

import pytest
import toy

from maknet_jax import attribute, evaluate, files, noisy_student, perturb, report, train
from maknet_jax.errors import InputError
from maknet_jax.explain import results
from maknet_jax.explain.options import PathOptions, SelectionOptions
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir


@pytest.fixture
def moved(trained, tmp_path):
    """move() renames a copy of the run; returns (its folder, move)."""
    folder = shutil.copytree(trained, tmp_path / "before")

    def move():
        return folder.rename(tmp_path / "after")

    return folder, move


def test_report_resumes_after_a_rename_and_shows_the_new_name(moved):
    folder, move = moved
    first = report.report(folder, count=1, steps=2)
    assert "/before)" in first.read_text()
    cases = sorted(path.name for path in first.parent.rglob("*.npz"))
    folder = move()
    times = {path: path.stat().st_mtime_ns for path in (folder / "report").rglob("*.npz")}
    text = report.report(folder, count=1, steps=2).read_text()
    assert "/after)" in text and "/before)" not in text
    assert sorted(path.name for path in (folder / "report").rglob("*.npz")) == cases
    assert times == {path: path.stat().st_mtime_ns for path in times}  # nothing was computed again


@pytest.mark.parametrize("verb", [attribute.attribute, perturb.perturb])
def test_results_resume_with_a_renamed_network(moved, tmp_path, verb):
    folder, move = moved
    out, options = tmp_path / "out", SelectionOptions(split="test", limit=2)
    path = PathOptions(steps=2, refine=0) if verb is attribute.attribute else PathOptions(steps=2)
    verb(folder, out, options, path)
    # As an earlier version wrote them: the name belonged to the identity.
    settings = files.read_json(out / "settings.json")
    (identity,) = settings["networks"]
    old = settings | {"networks": [["maknet (runs/before)", *identity]]}
    files.write_json(out / "settings.json", old)
    folder = move()
    again = verb(folder, out, options, path)
    assert again["images"] == 2
    assert files.read_json(out / "settings.json")["networks"] == [identity]
    table = next(out.glob("*.csv")).read_text()
    assert f"maknet ({folder.parent.name}/after)" in table and "/before)" not in table
    stored = results.load_metadata(next((out / "cases").glob("*.npz")))
    assert "before" in stored["models"][0]["name"]


def test_other_weights_of_the_same_name_are_still_refused(moved, tmp_path, shards):
    folder, _ = moved
    out, options = tmp_path / "out", SelectionOptions(split="test", limit=1)
    attribute.attribute(folder, out, options, PathOptions(steps=1, refine=0))
    config = files.read_json(folder / "config.json")
    config["seed"], config["epochs"], config["evaluate_every"] = 9, 0.5, 0.5
    shutil.rmtree(folder)
    train.train(configs.from_json(config), folder)
    with pytest.raises(InputError, match="with networks"):
        attribute.attribute(folder, out, options, PathOptions(steps=1, refine=0))


def test_evaluate_and_predict_open_a_moved_run(moved, tmp_path):
    folder, move = moved
    expected = evaluate.evaluate(folder, splits=["test"])["splits"]
    assert evaluate.evaluate(move(), splits=["test"])["splits"] == expected


def test_noisy_student_from_last_resumes_in_a_moved_folder(tmp_path):
    data = toy.write(tmp_path / "data")
    unlabelled = toy.write_unlabelled(tmp_path / "unlabelled")
    tiny = toy.overrides(data, "smoke", epochs=0.8, evaluate_every=0.8)
    tiny = tuple(change for change in tiny if not change.startswith("data.path"))
    changes = [
        f"labelled={data}",
        f"unlabelled={unlabelled}",
        "rounds=1",
        "from_last=True",
        "teacher=smoke",
        "student=smoke_student",
        "threshold=0.01",
        "evaluate=('val',)",
        f"teacher_changes={tiny}",
        f"student_changes={(*tiny, 'pseudo.batch_size=8')}",
    ]
    config = configs.load("noisy_student", changes)
    first = noisy_student.noisy_student(config, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    shutil.rmtree(tmp_path / "after" / "round-1" / "evaluation")
    again = noisy_student.noisy_student(config, tmp_path / "after")
    assert again["rounds"] == first["rounds"]
    assert workdir.open_run(tmp_path / "after" / "round-1").step == first["rounds"][1]["step"]
