"""`maknet noisy-student`: rounds from end to end, resuming, and rejected input."""

import contextlib
import csv
import itertools
import json
import shutil

import pytest
import toy
from runs import Killed, kill, newest_checkpoint, on_call, sigterm

from maknet_jax import cli, evaluate, files, noisy_student
from maknet_jax.data import pipeline, pseudo_labels
from maknet_jax.errors import InputError, Stopped
from maknet_jax.evaluation import evaluator
from maknet_jax.runs import config as configs
from maknet_jax.runs import workdir
from maknet_jax.training import checkpoint, sharding, transfer

TINY = {
    "data.size": toy.SIZE,
    "data.batch_size": toy.BATCH,
    "epochs": 3.2,  # 16 steps
    "evaluate_every": 1.6,
    "checkpoint_every": 5,
    "log_every": 4,
    "optimizer.learning_rate": 0.005,
    "model.options.edge": 4,
}
STUDENT = {"pseudo.batch_size": 16, "ema_decay": 0.5}


def changes(values):
    return tuple(f"{key}={value}" for key, value in values.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(labelled, unlabelled) images; the splits test and hand are copies of val and train."""
    folder = tmp_path_factory.mktemp("data")
    labelled = toy.write(folder / "labelled")
    info = files.read_json(labelled / "dataset.json")
    info["splits"] |= {"test": info["splits"]["val"], "hand": info["splits"]["train"]}
    info |= {"kind": "deeplesion", "about": {}}  # so that the paper's numbers are shown
    files.write_json(labelled / "dataset.json", info)
    return labelled, toy.write_unlabelled(folder / "unlabelled")


@pytest.fixture(scope="module")
def overrides(data):
    """Changes that make the paper's config tiny, as on the command line."""
    return {
        "labelled": data[0],
        "unlabelled": data[1],
        "rounds": 2,
        "teacher": "linear",
        "student": "linear",
        "teacher_changes": changes(TINY),
        "student_changes": changes(TINY | STUDENT),
    }


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    """command(workdir, field=value) -> the exit code."""
    cache = str(tmp_path_factory.mktemp("xla"))

    def run(folder, **more):
        fields = [f"--config.{key}={value}" for key, value in (overrides | more).items()]
        argv = ["noisy-student", "--config", "noisy_student", "--workdir", str(folder), *fields]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
            return cli.main(argv)

    return run


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The workdir of a teacher and two students, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "ns"
    assert command(folder) == 0
    return folder


def make_config(overrides, **more):
    texts = [f"{key}={value}" for key, value in (overrides | more).items()]
    return configs.load("noisy_student", texts)


def final(folder, number):
    """The last state of a round."""
    run = folder / f"round-{number}"
    return newest_checkpoint(run, configs.from_json(files.read_json(run / "config.json")))[0]


def equal_rounds(one, two, rounds=2):
    """Tables, labels and weights, bit for bit."""
    for name in ("table2.csv", "table2.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    for number in range(rounds + 1):
        states = [final(folder, number) for folder in (one, two)]
        assert int(states[0].step) == 16
        assert checkpoint.digests(states[0]) == checkpoint.digests(states[1]), number
        assert toy.lines(one / f"round-{number}") == toy.lines(two / f"round-{number}")
    for number in range(1, rounds + 1):
        shards = [sorted((folder / f"pseudo-{number}").glob("*.npy")) for folder in (one, two)]
        assert len(shards[0]) == len(shards[1]) == 3
        for first, second in zip(*shards, strict=True):
            assert first.read_bytes() == second.read_bytes()
    summaries = [files.read_json(folder / "summary.json")["rounds"] for folder in (one, two)]
    assert summaries[0] == summaries[1]


def test_each_round_learns_from_the_labels_of_the_previous_one(whole, data):
    digests = []
    for number in (0, 1, 2):
        state = final(whole, number)
        assert int(state.step) == 16 and bool(state.ema) == (number > 0)
        run = workdir.open_run(whole / f"round-{number}")
        digests.append(transfer.digest(run.variables["params"], run.variables["batch_stats"]))
    assert len(set(digests)) == 3
    for number in (1, 2):
        labelled = files.read_json(whole / f"pseudo-{number}" / "pseudo.json")
        assert labelled["teacher_digest"] == digests[number - 1]
        assert labelled["images"] == 29 and labelled["kept"] > 0
        config = files.read_json(whole / f"round-{number}" / "config.json")
        assert config["pseudo"]["path"] == str(whole / f"pseudo-{number}")
        assert config["init"]["path"] == ""
        trained = files.read_json(whole / f"round-{number}" / "dataset.json")
        source = pseudo_labels.PseudoSource(
            whole / f"pseudo-{number}", size=toy.SIZE, names=toy.VOCABULARY.names
        )
        assert trained["pseudo_labels"] == source.fingerprint
        assert trained["path"] == str(data[0])
    assert files.read_json(whole / "round-0" / "config.json")["pseudo"]["path"] == ""


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_table_2_contains_the_evaluated_and_the_papers_numbers(whole):
    header, *rows = read_csv(whole / "table2.csv")
    assert [row[0] for row in rows] == ["0 (teacher)", "1 (student)", "2 (student)"]
    metrics = ["auc", "f1", "precision", "recall"]
    expected = ["round"]
    for split in ("test", "hand"):
        expected += [f"{split}_{m}" for m in metrics] + [f"paper_{split}_{m}" for m in metrics]
    assert header == expected and len(set(header)) == len(header)
    summary = files.read_json(whole / "summary.json")
    for number, row in enumerate(rows):
        evaluated = evaluate.evaluate(whole / f"round-{number}")["splits"]
        assert summary["rounds"][number]["splits"] == evaluated
        for half, split in enumerate(("test", "hand")):
            ours, paper = row[1 + 8 * half : 5 + 8 * half], row[5 + 8 * half : 9 + 8 * half]
            assert ours == [f"{evaluated[split][metric]:.4f}" for metric in metrics]
            assert paper == [f"{value:.4f}" for value in noisy_student.PAPER[number][half]]
    markdown = (whole / "table2.md").read_text().splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert [lines[0], *lines[2:]] == [header, *rows]
    assert (whole / "table2.png").read_bytes().startswith(b"\x89PNG")
    assert summary["files"] == [str(whole / f"table2.{kind}") for kind in ("csv", "md", "png")]


def in_training(patch, step, how):
    """Calls `how` when the student takes its `step`th batch."""
    original = pipeline.mixed_batches

    def batches(sources, *args, **options):
        for count, batch in enumerate(original(sources, *args, **options), start=1):
            if len(sources) == 2 and count == step:
                how()
            yield batch

    patch.setattr(pipeline, "mixed_batches", batches)


def too_late(patch, folder):
    """Sends a signal while the teacher's last state is saved, when its run can no longer stop."""
    original = checkpoint.Checkpoints.save

    def save(self, current, meta=None):
        original(self, current, meta)
        if self.folder == folder / "round-0" / "checkpoints" and int(current.step) == 16:
            sigterm()

    patch.setattr(checkpoint.Checkpoints, "save", save)


def test_killed_anywhere_it_resumes_to_the_same_result(command, whole, tmp_path, capsys):
    """One run, interrupted at one place after the other."""
    folder = tmp_path / "ns"

    @contextlib.contextmanager
    def stops(code=75):
        with pytest.MonkeyPatch.context() as patch:
            yield patch
            if code is Killed:
                with pytest.raises(Killed):
                    command(folder)
            else:
                assert command(folder) == code
        assert not (folder / "summary.json").exists()

    def there():
        return sorted(path.name for path in folder.glob("*-*"))

    with stops() as patch:
        too_late(patch, folder)
    assert there() == ["round-0"] and not (folder / "table2.csv").exists()
    with stops() as patch:  # in the evaluation of the teacher
        on_call(patch, evaluate, "_write", sigterm, where="round-0")
    assert there() == ["round-0"]
    with stops(Killed) as patch:
        on_call(patch, pseudo_labels, "write_rows", kill, count=2, where="pseudo-1")
    assert there() == ["pseudo-1", "round-0"]
    with stops() as patch:
        on_call(patch, pseudo_labels, "write_rows", sigterm, count=2, where="pseudo-1")
    assert len(read_csv(folder / "table2.csv")) == 2  # finished rounds can be read
    with stops() as patch:
        in_training(patch, 7, sigterm)
    with stops(Killed) as patch:  # the third batch after resuming: steps 8 and 9 are repeated
        in_training(patch, 3, kill)
    assert there() == ["pseudo-1", "round-0", "round-1"]
    with stops(Killed) as patch:
        on_call(patch, evaluate, "_write", kill, where="round-1")
    for left in ("pseudo-2/.claim.json.x.tmp", "round-2/.dataset.json.x.tmp"):  # leftovers
        files.write_json(folder / left, {})
    with stops() as patch:
        on_call(patch, files, "write_json", sigterm, count=2, where="pseudo-2")
    capsys.readouterr()
    assert command(folder) == 0
    output = capsys.readouterr().out
    assert "round 2" in output and str(folder / "table2.csv") in output
    equal_rounds(whole, folder)


def test_rounds_can_be_added_and_a_finished_run_trains_nothing(
    command, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "ns"
    assert command(folder, rounds=1) == 0
    assert read_csv(folder / "table2.csv") == read_csv(whole / "table2.csv")[:3]
    assert command(folder) == 0
    equal_rounds(whole, folder)
    monkeypatch.setattr(pipeline, "mixed_batches", lambda *_, **__: None)  # no step can be taken
    assert command(folder) == 0
    equal_rounds(whole, folder)


def test_students_added_to_an_older_run_have_its_recipe(command, tmp_path):
    student = changes(TINY | STUDENT | {"augment.translation_range": 0.2})
    paths = [tmp_path / "ns" / f"round-{number}" / "config.json" for number in (1, 2)]
    assert command(tmp_path / "ns", rounds=1, student_changes=student) == 0
    stored = files.read_json(paths[0])
    del stored["augment"]["translation_range"]  # as a version that lacks the field writes it
    files.write_json(paths[0], stored)
    assert command(tmp_path / "ns", student_changes=student) == 0
    assert files.read_json(paths[1])["augment"]["translation_range"] == 0.1


def test_another_config_in_the_same_folder_is_rejected(command, whole, data, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.glob("*.json")}
    for changed, says in (
        ({"threshold": 0.4}, "threshold 0.5, not 0.4"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"from_last": True}, "from_last False, not True"),
        ({"student_changes": changes(TINY)}, "student_changes"),
        ({"student_changes": changes(TINY | {"data.size": 64})}, "data.size 64"),
        ({"student_changes": changes(TINY | STUDENT | {"pseudo.batch_size": 12})}, "12"),
    ):
        assert command(whole, **changed) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.strip().splitlines()) == 1
    assert command(whole / "round-0") == 2
    assert "noisy-student" in capsys.readouterr().err
    # Other images under the same name.
    folder = tmp_path / "ns"
    shutil.copytree(whole, folder)
    shutil.copytree(data[1], tmp_path / "unlabelled")
    claim = files.read_json(folder / "noisy_student.json")
    del claim["precision"]  # of an earlier version
    claim["unlabelled"] = str(toy.write_unlabelled(tmp_path / "unlabelled", seed=8))
    files.write_json(folder / "noisy_student.json", claim)
    assert command(folder, unlabelled=claim["unlabelled"]) == 2
    assert "fingerprint" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in whole.glob("*.json")}


def test_invalid_input_is_rejected_before_the_first_round(overrides, data, tmp_path):
    folder = tmp_path / "ns"

    def rejected(message, **more):
        with pytest.raises(InputError, match=message) as error:
            noisy_student.noisy_student(make_config(overrides, **more), folder)
        assert "\n" not in str(error.value) and not folder.exists()

    rejected("rounds -1", rounds=-1)
    rejected("'newest'", checkpoint="newest")
    rejected("top 0", top=0)
    rejected("threshold 1.5", threshold=1.5)
    rejected("precision 2.0", precision=2.0)
    rejected("'nine'.*labelled.*train, val", evaluate=("nine",))
    rejected("'train'.*unlabelled", split="train")
    rejected("nowhere", unlabelled="nowhere")
    rejected("'studen'", student="studen")
    rejected("'epoch'.*'epochs'", student_changes=("epoch=3",))
    rejected("plain", labelled=toy.write(tmp_path / "plain"))
    large = tmp_path / "large"
    shutil.copytree(data[1], large)
    info = files.read_json(large / "dataset.json")
    files.write_json(large / "dataset.json", info | {"size": 64})
    rejected("large.* 64,.*labelled needs 32", unlabelled=large)


def test_from_last_starts_a_student_from_its_teacher(overrides, tmp_path):
    """At learning rate 0 the weights do not change from their initial values."""
    still = TINY | STUDENT | {"optimizer.learning_rate": 1e-300, "ema_decay": 0.0}
    teacher = {"epochs": 1.6, "evaluate_every": 0.8}
    for from_last in (True, False):
        folder = tmp_path / str(from_last)
        config = make_config(
            overrides,
            rounds=1,
            from_last=from_last,
            teacher_changes=changes(TINY | teacher),
            student_changes=changes(still | teacher),
        )
        noisy_student.noisy_student(config, folder)
        best = workdir.open_run(folder / "round-0").variables["params"]
        student = final(folder, 1).params
        same = checkpoint.digests(best) == checkpoint.digests(student)
        assert same == from_last
        init = json.loads((folder / "round-1" / "summary.json").read_text())["init"]
        labelled = files.read_json(folder / "pseudo-1" / "pseudo.json")
        if from_last:
            assert init["digest"] == labelled["teacher_digest"]  # the network that labelled
        else:
            assert init is None


def test_options_of_the_config_reach_the_rounds(overrides, tmp_path, monkeypatch):
    original, calls = evaluator.Scores.report, itertools.count(1)

    def falling(self, thresholds, parents, rules="ours"):
        report = original(self, thresholds, parents, rules)
        report.summary["auc"] = 1 / next(calls)  # so that the best state is not the last
        return report

    monkeypatch.setattr(evaluator.Scores, "report", falling)
    short = {"epochs": 1.6, "evaluate_every": 0.8}
    config = make_config(
        overrides,
        rounds=1,
        seed=3,
        top=2,
        threshold=0.25,
        precision=0.6,
        soft=True,
        checkpoint="last",
        evaluate=("val",),
        teacher_changes=changes(TINY | short),
        student_changes=changes(TINY | short | STUDENT),
    )
    summary = noisy_student.noisy_student(config, tmp_path / "ns")
    labelled = files.read_json(tmp_path / "ns" / "pseudo-1" / "pseudo.json")
    names = ("top", "threshold", "precision", "soft", "teacher_step")
    assert [labelled[name] for name in names] == [2, 0.25, 0.6, True, 8]
    assert workdir.open_run(tmp_path / "ns" / "round-0").step == 4
    assert [list(done["splits"]) for done in summary["rounds"]] == [["val"], ["val"]]
    assert read_csv(tmp_path / "ns" / "table2.csv")[0][1:] == [
        f"val_{metric}" for metric in noisy_student.METRICS
    ]
    for number in (0, 1):
        saved = files.read_json(tmp_path / "ns" / f"round-{number}" / "config.json")
        assert saved["seed"] == 3 and saved["epochs"] == 1.6
        assert saved["ema_decay"] == (0.5 if number else 0.0)


def test_the_first_process_writes_after_all_have_checked_the_folder(
    overrides, tmp_path, monkeypatch
):
    folder, calls = tmp_path / "ns", []

    def wait_for_all(name):
        calls.append((name, (folder / "noisy_student.json").exists()))
        if name == "claimed":
            raise Stopped

    monkeypatch.setattr(sharding, "wait_for_all", wait_for_all)
    with pytest.raises(Stopped):
        noisy_student.noisy_student(make_config(overrides), folder)
    assert calls == [("checked claim", False), ("claimed", True)]
