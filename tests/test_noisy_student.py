"""`maknet noisy-student`: rounds from end to end, killed anywhere, and the paper's table 2."""

import contextlib
import csv
import itertools
import json
import re
import shutil

import pytest
import toy
from runs import Killed, compile_cache, kill, newest_checkpoint, on_call, sigterm  # noqa: F401

from benchmarks.real_data import PAPER
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
    "optimizer.learning_rate": 0.05,
    "model.options.edge": 4,
}
STUDENT = {"pseudo.batch_size": 16, "ema_decay": 0.5}


def changes(values):
    return tuple(f"{key}={value}" for key, value in values.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(labelled, unlabelled) images; the test set and the hand-labelled one are val and train."""
    folder = tmp_path_factory.mktemp("data")
    labelled = toy.write(folder / "labelled")
    info = files.read_json(labelled / "dataset.json")
    info["splits"] |= {"test": info["splits"]["val"], "hand": info["splits"]["train"]}
    files.write_json(labelled / "dataset.json", info)
    return labelled, toy.write_unlabelled(folder / "unlabelled")


@pytest.fixture(scope="module")
def overrides(data):
    """What makes the paper's page tiny, as the command line says it."""
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
    """The workdir of a teacher and two students, not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "ns"
    assert command(folder) == 0
    return folder


def page(overrides, **more):
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


def test_each_round_learns_from_the_labels_of_the_one_before(whole, data):
    digests = []
    for number in (0, 1, 2):
        state = final(whole, number)
        assert int(state.step) == 16 and bool(state.ema) == (number > 0)
        run = workdir.open_run(whole / f"round-{number}")
        digests.append(transfer.digest(run.variables["params"], run.variables["batch_stats"]))
    assert len(set(digests)) == 3
    for number in (1, 2):
        about = files.read_json(whole / f"pseudo-{number}" / "pseudo.json")
        assert about["teacher_digest"] == digests[number - 1]
        assert about["images"] == 29 and about["kept"] > 0
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


def test_table_2_holds_what_evaluate_says_and_the_papers_numbers(whole):
    header, *rows = read_csv(whole / "table2.csv")
    assert [row[0] for row in rows] == ["0 (teacher)", "1 (student)", "2 (student)"]
    metrics = ["auc", "f1", "precision", "recall"]
    expected = ["round"]
    for split in ("test", "hand"):
        expected += [f"{split} {m}" for m in metrics] + [f"paper {m}" for m in metrics]
    assert header == expected
    summary = files.read_json(whole / "summary.json")
    for number, row in enumerate(rows):
        found = evaluate.evaluate(whole / f"round-{number}")["splits"]
        assert summary["rounds"][number]["splits"] == found
        for half, split in enumerate(("test", "hand")):
            ours, paper = row[1 + 8 * half : 5 + 8 * half], row[5 + 8 * half : 9 + 8 * half]
            assert ours == [f"{found[split][metric]:.4f}" for metric in metrics]
            assert paper == [f"{value:.4f}" for value in noisy_student.PAPER[number][half]]
    markdown = (whole / "table2.md").read_text().splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert [lines[0], *lines[2:]] == [header, *rows]
    assert (whole / "table2.png").read_bytes().startswith(b"\x89PNG")
    assert summary["files"] == [str(whole / f"table2.{kind}") for kind in ("csv", "md", "png")]


def test_a_table_has_a_dash_where_there_is_no_number():
    values = {"auc": None, "f1": 0.5, "precision": 0.25, "recall": 1.0}
    rounds = [{"splits": {"test": values, "own": values}}] * 7
    header, rows = noisy_student.table(rounds)
    assert len(header) == 1 + 8 + 4 and len(rows) == 7
    ours = ["-", "0.5000", "0.2500", "1.0000"]
    assert rows[5] == ["5 (student)", *ours, "0.9112", "0.2275", "0.1735", "0.6583", *ours]
    assert rows[6] == ["6 (student)", *ours, "-", "-", "-", "-", *ours]


def test_the_papers_numbers_are_the_papers():
    if not PAPER.is_file():
        pytest.skip(f"the paper is not at {PAPER}")
    text = PAPER.read_text()
    table = text[text.index("**Table 2.**") :]
    found = {}
    for line in re.findall(
        r"^\| (\d)(?: \(teacher\))? +\|(.*)$", table[: table.index("###")], re.M
    ):
        numbers = [float(cell) for cell in line[1].split("|") if cell.strip()]
        found[int(line[0])] = (tuple(numbers[:4]), tuple(numbers[4:]))
    assert len(found) == 6 and found == noisy_student.PAPER


def in_training(patch, step, how):
    """Breaks the student's training off when it takes a batch."""
    original = pipeline.mixed_batches

    def batches(sources, *args, **options):
        for taken, batch in enumerate(original(sources, *args, **options), start=1):
            if len(sources) == 2 and taken == step:
                how()
            yield batch

    patch.setattr(pipeline, "mixed_batches", batches)


def too_late(patch, folder):
    """A signal while the last state of the teacher is saved: its run cannot stop any more."""
    original = checkpoint.Checkpoints.save

    def save(self, current, meta=None):
        original(self, current, meta)
        if self.folder == folder / "round-0" / "checkpoints" and int(current.step) == 16:
            sigterm()

    patch.setattr(checkpoint.Checkpoints, "save", save)


def test_killed_anywhere_it_ends_as_if_it_had_not_been(command, whole, tmp_path, capsys):
    """One run, broken off at one place after the other."""
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
    assert len(read_csv(folder / "table2.csv")) == 2  # what is reached can be read
    with stops() as patch:
        in_training(patch, 7, sigterm)
    with stops(Killed) as patch:  # the third batch from there: steps 8 and 9 come again
        in_training(patch, 3, kill)
    assert there() == ["pseudo-1", "round-0", "round-1"]
    with stops(Killed) as patch:
        on_call(patch, evaluate, "_write", kill, where="round-1")
    for left in ("pseudo-2/.claim.json.x.tmp", "round-2/.dataset.json.x.tmp"):  # of killed writers
        files.write_json(folder / left, {})
    with stops() as patch:
        on_call(patch, files, "write_json", sigterm, count=2, where="pseudo-2")
    capsys.readouterr()
    assert command(folder) == 0
    output = capsys.readouterr().out
    assert "round 2" in output and str(folder / "table2.csv") in output
    equal_rounds(whole, folder)


def test_more_rounds_may_follow_and_a_finished_run_has_nothing_to_do(
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


def test_another_config_in_the_same_folder_is_refused(command, whole, data, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.glob("*.json")}
    for changed, says in (
        ({"threshold": 0.4}, "with threshold 0.5, not 0.4: choose another --workdir"),
        ({"seed": 1}, "with seed 0, not 1"),
        ({"from_last": True}, "with from_last False, not True"),
        ({"student_changes": changes(TINY)}, "with student_changes"),
        (
            {"student_changes": changes(TINY | {"data.size": 64})},
            "config data.size 64 does not match the",
        ),
        ({"student_changes": changes(TINY | STUDENT | {"pseudo.batch_size": 12})}, "12 should be "),
    ):
        assert command(whole, **changed) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.strip().splitlines()) == 1
    assert command(whole / "round-0") == 2
    assert "output of `maknet noisy-student`" in capsys.readouterr().err
    # Other images under the same name.
    folder = tmp_path / "ns"
    shutil.copytree(whole, folder)
    shutil.copytree(data[1], tmp_path / "unlabelled")
    claim = files.read_json(folder / "noisy_student.json")
    claim["unlabelled"] = str(toy.write_unlabelled(tmp_path / "unlabelled", seed=8))
    files.write_json(folder / "noisy_student.json", claim)
    assert command(folder, unlabelled=claim["unlabelled"]) == 2
    assert "with fingerprint " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in whole.glob("*.json")}


def test_what_would_fail_later_is_refused_before_the_first_round(overrides, data, tmp_path):
    folder = tmp_path / "ns"

    def refused(message, **more):
        with pytest.raises(InputError, match=message) as error:
            noisy_student.noisy_student(page(overrides, **more), folder)
        assert "\n" not in str(error.value) and not folder.exists()

    refused("rounds -1 should be 0 or above", rounds=-1)
    refused("checkpoint 'newest' is unknown: choose best or last", checkpoint="newest")
    refused("top 0 should be", top=0)
    refused("threshold 1.5 should be", threshold=1.5)
    refused("split 'nine' is not in .*labelled: it has train, val", evaluate=("nine",))
    refused("split 'train' is not in .*unlabelled: it has unlabelled", split="train")
    refused("holds no finished data set", unlabelled="nowhere")
    refused("config 'studen' is not there", student="studen")
    refused("'epoch' is unknown: did you mean 'epochs'", student_changes=("epoch=3",))
    refused("has neither test nor hand: name splits", labelled=toy.write(tmp_path / "plain"))
    large = tmp_path / "large"
    shutil.copytree(data[1], large)
    info = files.read_json(large / "dataset.json")
    files.write_json(large / "dataset.json", info | {"size": 64})
    refused("large has images of 64, .*labelled of 32: prepare one of them again", unlabelled=large)


def test_a_student_starts_from_its_teacher_only_where_it_is_told_to(overrides, tmp_path):
    """At learning rate 0 the weights stay those that it started from."""
    still = TINY | STUDENT | {"optimizer.learning_rate": 0.0, "ema_decay": 0.0}
    teacher = {"epochs": 1.6, "evaluate_every": 0.8}
    for from_last in (True, False):
        folder = tmp_path / str(from_last)
        config = page(
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
        about = files.read_json(folder / "pseudo-1" / "pseudo.json")
        if from_last:
            assert init["digest"] == about["teacher_digest"]  # the one that labelled
        else:
            assert init is None


def test_the_options_reach_the_rounds(overrides, tmp_path, monkeypatch):
    original, calls = evaluator.Scores.report, itertools.count(1)

    def falling(self, thresholds, parents):
        report = original(self, thresholds, parents)
        report.summary["auc"] = 1 / next(calls)  # so that the best state is never the last
        return report

    monkeypatch.setattr(evaluator.Scores, "report", falling)
    short = {"epochs": 1.6, "evaluate_every": 0.8}
    config = page(
        overrides,
        rounds=1,
        seed=3,
        top=2,
        threshold=0.25,
        soft=True,
        checkpoint="last",
        evaluate=("val",),
        teacher_changes=changes(TINY | short),
        student_changes=changes(TINY | short | STUDENT),
    )
    summary = noisy_student.noisy_student(config, tmp_path / "ns")
    about = files.read_json(tmp_path / "ns" / "pseudo-1" / "pseudo.json")
    assert [about[key] for key in ("top", "threshold", "soft", "teacher_step")] == [
        2,
        0.25,
        True,
        8,
    ]
    assert workdir.open_run(tmp_path / "ns" / "round-0").step == 4
    assert [list(done["splits"]) for done in summary["rounds"]] == [["val"], ["val"]]
    assert read_csv(tmp_path / "ns" / "table2.csv")[0][1:] == [
        f"val {metric}" for metric in noisy_student.METRICS
    ]
    for number in (0, 1):
        saved = files.read_json(tmp_path / "ns" / f"round-{number}" / "config.json")
        assert saved["seed"] == 3 and saved["epochs"] == 1.6
        assert saved["ema_decay"] == (0.5 if number else 0.0)


def test_the_first_process_writes_when_all_have_looked(overrides, tmp_path, monkeypatch):
    folder, seen = tmp_path / "ns", []

    def wait_for_all(name):
        seen.append((name, folder.exists()))
        if name == "claimed":
            raise Stopped("enough")

    monkeypatch.setattr(sharding, "wait_for_all", wait_for_all)
    with pytest.raises(Stopped, match="enough"):
        noisy_student.noisy_student(page(overrides), folder)
    assert seen == [("looked", False), ("claimed", True)]
