"""`maknet pseudo-label`: labels and counts, resuming, and independence of the devices."""

import contextlib
import csv
import shutil

import jax
import numpy as np
import pytest
import toy
from pseudo_runs import (
    COUNTS,
    SHARDS,
    confidences_of,
    greedy,
    labels_of,
    read_rows,
    train_teacher,
)
from runs import Killed, kill, on_call, sigterm

from maknet_jax import cli, files, pseudo_label, train
from maknet_jax.data import pseudo_labels, records
from maknet_jax.errors import InputError
from maknet_jax.runs import workdir
from maknet_jax.training import sharding


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return toy.write_unlabelled(tmp_path_factory.mktemp("images") / "data", COUNTS)


@pytest.fixture(scope="module")
def whole(teacher, images, tmp_path_factory):
    """All images labelled in one uninterrupted call: (folder, result)."""
    out = tmp_path_factory.mktemp("whole") / "pseudo"
    return out, pseudo_label.pseudo_label(teacher, images, out)


@pytest.fixture(scope="module")
def confidences(teacher, images):
    source = records.open_dataset(images).source("unlabelled")
    return confidences_of(teacher, [source[number].image for number in range(29)])


def equal_outputs(one, two):
    """Checks that all output is identical, except for the log."""
    same = [*SHARDS, "counts.csv", "sweep.csv", "pseudo.json", "claim.json"]
    for out in (one, two):
        names = {path.name for path in out.iterdir()}
        assert names == {*same, "made", "histogram.png", "log.jsonl"}
    for name in same:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_labels_and_counts_follow_from_the_confidences(whole, confidences, images):
    out, result = whole
    assert result == files.read_json(out / "pseudo.json")
    expected = {k: greedy(confidences[k]) for k in range(29)}
    rows = read_rows(out)
    assert {int(row["index"]): labels_of(row) for row in rows} == {
        k: columns for k, columns in expected.items() if columns
    }
    assert rows["index"].tolist() == sorted(rows["index"].tolist())
    for row in rows:
        scores = confidences[row["index"], labels_of(row)]
        np.testing.assert_allclose(row["confidences"][: len(scores)], scores, atol=1e-6)
    flat = [column for columns in expected.values() for column in columns]
    dropped = sum(not columns for columns in expected.values())
    assert (result["images"], result["dropped"], result["kept"]) == (29, dropped, 29 - dropped)
    assert dropped > 0 and result["close"] == 0
    assert result["label_counts"] == [flat.count(column) for column in range(4)]
    assert result["labels_given"] == len(flat) == sum(result["confidences"])
    assert result["confidences"] == np.histogram(rows["confidences"], 20, (1e-9, 1))[0].tolist()
    assert flat.count(0) + flat.count(3) < (confidences[:, [0, 3]] > 0.5).sum()  # exclusion bites
    counts = {row["label"]: int(row["images"]) for row in read_csv(out / "counts.csv")}
    assert counts == dict(zip(toy.VOCABULARY.names, result["label_counts"], strict=True))
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_the_sweep_counts_the_labels_of_other_thresholds(whole, confidences):
    rows = read_csv(whole[0] / "sweep.csv")
    assert [float(row["threshold"]) for row in rows] == [k / 10 for k in range(1, 10)]
    for row in rows:
        selected = [greedy(values, threshold=float(row["threshold"])) for values in confidences]
        assert int(row["images"]) == sum(map(bool, selected))
        assert int(row["labels"]) == sum(map(len, selected))
    assert len({row["labels"] for row in rows}) >= 4


def test_the_result_names_teacher_images_and_rule(whole, teacher, images):
    out, result = whole
    run = workdir.open_run(teacher)
    assert result["teacher"] == str(teacher) and result["teacher_step"] == run.step
    assert result["records"] == str(images) and result["split"] == "unlabelled"
    assert (result["top"], result["threshold"], result["soft"]) == (15, 0.5, False)
    assert [shard["images"] for shard in result["shards"]] == list(COUNTS)
    assert (out / "histogram.png").read_bytes().startswith(b"\x89PNG")
    source = pseudo_labels.PseudoSource(out, size=toy.SIZE, names=toy.VOCABULARY.names)
    assert len(source) == result["kept"]
    # The images were drawn with these labels, and the teacher recognises all of them.
    for k in range(len(source)):
        drawn = toy.example("unlabelled", int(source[k].id.split("-")[1]), 7).labels
        wrong = source[k].labels != drawn
        assert not wrong.any() or (drawn[[0, 3]] == 1).all() and wrong.sum() == 1


def test_top_threshold_and_soft_are_applied(teacher, images, confidences, tmp_path):
    options = {"top": 2, "threshold": 0.6, "soft": True}
    result = pseudo_label.pseudo_label(teacher, images, tmp_path / "out", **options)
    expected = [greedy(values, top=2, threshold=0.6) for values in confidences]
    rows = read_rows(tmp_path / "out")
    assert rows["labels"].shape[1] == 2
    assert [labels_of(row) for row in rows] == [columns for columns in expected if columns]
    assert result["dropped"] == sum(not columns for columns in expected)
    names = toy.VOCABULARY.names
    source = pseudo_labels.PseudoSource(tmp_path / "out", size=toy.SIZE, names=names)
    for k, row in enumerate(rows):
        labels, selected = source[k].labels, labels_of(row)
        np.testing.assert_array_equal(labels[selected], row["confidences"][: len(selected)])
        assert np.count_nonzero(labels) == len(selected)
        assert 0.6 < labels[selected].min() and labels.max() < 1


def test_images_without_labels_are_counted_and_no_student_reads_them(teacher, images, tmp_path):
    out = tmp_path / "out"
    result = pseudo_label.pseudo_label(teacher, images, out, threshold=0.999999)
    assert (result["kept"], result["dropped"], result["labels_given"]) == (0, 29, 0)
    assert (out / "histogram.png").exists()
    with pytest.raises(InputError, match="--threshold"):
        pseudo_labels.PseudoSource(out, size=toy.SIZE, names=toy.VOCABULARY.names)


@pytest.fixture
def scored(monkeypatch):
    """The number of images scored in each step."""
    counts, original = [], workdir.Run.score

    def score(self, batch):
        counts.append(int((batch["weight"] > 0).sum()))
        return original(self, batch)

    monkeypatch.setattr(workdir.Run, "score", score)
    return counts


# Of the JSON files the first is claim.json; each shard has one, then comes pseudo.json.
@pytest.mark.parametrize(
    "module, name, count, done",
    [
        (pseudo_labels, "write_rows", 1, 0),
        (pseudo_labels, "write_rows", 2, 1),
        (files, "write_json", 3, 1),  # a shard is written, but its counts are not
        (files, "write_json", 5, 3),  # only pseudo.json is missing
    ],
)
def test_killed_anywhere_it_resumes_to_the_same_result(
    whole, teacher, images, tmp_path, scored, module, name, count, done
):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, module, name, kill, count=count)
        with pytest.raises(Killed):
            pseudo_label.pseudo_label(teacher, images, out)
    assert not (out / "pseudo.json").exists()
    before = {path: path.stat().st_mtime_ns for path in sorted((out / "made").glob("*"))}
    assert len(before) == done
    scored.clear()
    again = pseudo_label.pseudo_label(teacher, images, out)
    assert sum(scored) == sum(COUNTS[done:])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again == whole[1]
    equal_outputs(whole[0], out)


def test_a_finished_call_scores_nothing_again(whole, teacher, images, tmp_path, scored):
    shutil.copytree(whole[0], tmp_path / "out")
    assert pseudo_label.pseudo_label(teacher, images, tmp_path / "out") == whole[1]
    assert scored == []
    equal_outputs(whole[0], tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_missing_or_damaged_shard_is_labelled_again(
    whole, teacher, images, tmp_path, scored, damage
):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    damage(out / SHARDS[1])
    with pytest.raises(InputError, match=SHARDS[1]):
        pseudo_labels.PseudoSource(out, size=toy.SIZE, names=toy.VOCABULARY.names)
    pseudo_label.pseudo_label(teacher, images, out)  # as the message says
    assert sum(scored) == COUNTS[1]
    equal_outputs(whole[0], out)


def test_another_teacher_rule_or_data_set_is_rejected(whole, teacher, images, tmp_path):
    out = whole[0]
    content = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def rejected(key, folder=teacher, data=images, **options):
        with pytest.raises(InputError, match=rf"\b{key}\b") as error:
            pseudo_label.pseudo_label(folder, data, out, **options)
        assert "\n" not in str(error.value)

    rejected("top", top=3)
    rejected("threshold", threshold=0.4)
    rejected("soft", soft=True)
    config = toy.config(teacher.parent / "data", "linear", {"epochs": 1.6, "seed": 1})
    train.train(config, tmp_path / "other")
    rejected("teacher_digest", folder=tmp_path / "other")
    rejected("fingerprint", data=toy.write_unlabelled(tmp_path / "data", COUNTS, seed=6))
    split = toy.write_unlabelled(tmp_path / "labelled", COUNTS, labelled=True)
    rejected("fingerprint", data=split)
    assert content == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_moved_inputs_are_recognised(whole, teacher, images, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(teacher, tmp_path / "teacher")
    moved = [tmp_path / name for name in ("teacher", "images", "out")]
    result = pseudo_label.pseudo_label(*moved)
    changed = {key for key in result if result[key] != whole[1][key]}
    assert changed == {"teacher", "records"} and result["records"] == str(moved[1])


def test_invalid_input_is_rejected_before_anything_is_written(teacher, images, tmp_path):
    out = tmp_path / "out"

    def rejected(message, data=images, folder=teacher, out=out, **options):
        with pytest.raises(InputError, match=message) as error:
            pseudo_label.pseudo_label(folder, data, out, **options)
        assert "\n" not in str(error.value)

    rejected("top 0", top=0)
    rejected("threshold 1.0", threshold=1.0)
    rejected("threshold nan", threshold=float("nan"))
    rejected("'train'.*unlabelled", split="train")
    rejected(str(tmp_path), folder=tmp_path)
    rejected("dataset.json", data=tmp_path)
    rejected("labels", truth=True)
    info = files.read_json(images / "dataset.json")
    shutil.copytree(images, tmp_path / "large")
    files.write_json(tmp_path / "large" / "dataset.json", info | {"size": 64})
    rejected("64, but the teacher needs 32", data=tmp_path / "large")
    info["splits"]["empty"] = {"count": 0, "label_counts": [], "shards": []}
    files.write_json(tmp_path / "large" / "dataset.json", info)
    rejected("'empty'", data=tmp_path / "large", split="empty")
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    rejected(str(tmp_path / "file"), out=tmp_path / "file")
    rejected(str(images), out=images)


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_one_device_gives_the_labels_of_eight(
    whole, teacher, images, confidences, tmp_path, batch_size
):
    options = {"devices": jax.devices()[:1], "batch_size": batch_size}
    result = pseudo_label.pseudo_label(teacher, images, tmp_path / "out", **options)
    one, eight = read_rows(tmp_path / "out"), read_rows(whole[0])
    # No image is close, so only the last digits may differ.
    assert result["close"] == whole[1]["close"] == 0
    np.testing.assert_array_equal(one["index"], eight["index"])
    np.testing.assert_array_equal(one["labels"], eight["labels"])
    np.testing.assert_allclose(one["confidences"], eight["confidences"], atol=1e-6)
    for name in ("label_counts", "kept", "dropped", "sweep"):
        assert result[name] == whole[1][name]
    assert [shard["images"] for shard in result["shards"]] == list(COUNTS)


def test_close_images_are_counted(teacher, images, confidences, tmp_path):
    """With a confidence as the threshold, its image is close on any number of devices."""
    threshold = float(np.sort(confidences[confidences > 0.5])[3])
    near = (np.abs(confidences - threshold) < pseudo_labels.CLOSE["float32"]).any(axis=1)
    assert near.sum() == 1
    for count in (1, 8):
        options = {"devices": jax.devices()[:count], "threshold": threshold}
        out = tmp_path / str(count)
        assert pseudo_label.pseudo_label(teacher, images, out, **options)["close"] == 1


def test_labels_of_an_earlier_version_without_a_precision_are_resumed(
    whole, teacher, images, tmp_path
):
    shutil.copytree(whole[0], tmp_path / "out")
    stored = files.read_json(tmp_path / "out" / "claim.json")
    assert stored.pop("precision") is None
    files.write_json(tmp_path / "out" / "claim.json", stored)
    result = pseudo_label.pseudo_label(teacher, images, tmp_path / "out")
    assert result["kept"] == whole[1]["kept"]


def test_pseudo_labels_are_compared_with_the_true_labels(
    teacher, images, confidences, tmp_path, capsys
):
    """29 images; for some of them two labels are unknown."""
    data = toy.write_unlabelled(tmp_path / "data", COUNTS, labelled=True)
    first = records.open_dataset(data).split("unlabelled")["shards"][0]["file"]
    truth = [toy.example("unlabelled", k, 7) for k in range(29)]
    for example in truth[:10]:
        example.label_mask[:2] = 0
    records.write_shard(data / first, map(records.encode, truth[:10]))
    options = {"threshold": 0.1}  # so low that some are wrong
    result = pseudo_label.pseudo_label(teacher, data, tmp_path / "out", truth=True, **options)
    rows = read_csv(tmp_path / "out" / "sweep.csv")
    for threshold, counts in [(0.1, result["judged"])] + [(float(r["threshold"]), r) for r in rows]:
        selected = right = true = 0
        for example, values in zip(truth, confidences, strict=True):
            chosen = greedy(values, threshold=threshold)
            for column in range(4):
                if example.label_mask[column]:
                    selected += column in chosen
                    right += column in chosen and example.labels[column] == 1
                    true += int(example.labels[column])
        assert [int(counts[key]) for key in ("given", "right", "true")] == [selected, right, true]
    judged = result["judged"]
    assert 0 < judged["right"] < judged["given"] < result["labels_given"]
    assert judged["precision"] == judged["right"] / judged["given"]
    assert judged["recall"] == judged["right"] / judged["true"]
    assert f"{judged['precision']:.3f}" in capsys.readouterr().err
    # A student reads the same rows with and without the true labels.
    pseudo_label.pseudo_label(teacher, images, tmp_path / "without", **options)
    assert read_rows(tmp_path / "out").tobytes() == read_rows(tmp_path / "without").tobytes()


@pytest.fixture
def command(monkeypatch, tmp_path, teacher, images):
    """The command on the toy data, further arguments after it."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))

    def run(*more):
        argv = ["pseudo-label", "--workdir", teacher, "--records", images]
        return cli.main([str(part) for part in (*argv, "--out", tmp_path / "out", *more)])

    return run


def test_the_command_exits_75_when_stopped_and_0_when_resumed(
    command, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        on_call(patch, pseudo_labels, "write_rows", sigterm, count=2)
        assert command() == 75
    assert "SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pseudo.json").exists()
    assert command() == 0
    output = capsys.readouterr()
    assert f"{whole[1]['kept']} of 29" in output.out and "1 of 3 shards" in output.err
    equal_outputs(whole[0], tmp_path / "out")
    assert command("--threshold", "0.4") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_all_options_of_the_command_are_used(command, tmp_path, capsys):
    more = ["--top=3", "--threshold=0.25", "--soft", "--checkpoint=last", "--batch-size=3"]
    assert command(*more, "--split=unlabelled", "--precision=0.7") == 0
    result = files.read_json(tmp_path / "out" / "pseudo.json")
    names = ("top", "threshold", "precision", "soft", "teacher_step", "split", "truth")
    assert [result[name] for name in names] == [3, 0.25, 0.7, True, 80, "unlabelled", False]
    capsys.readouterr()
    for wrong in (["--top=0"], ["--threshold=high"], ["--checkpoint=newest"]):
        with contextlib.suppress(SystemExit):
            assert command(*wrong) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_first_process_writes_after_all_have_checked_the_folder(
    teacher, images, tmp_path, monkeypatch
):
    """Otherwise a slower process could see a folder that is neither empty nor claimed."""
    out, calls = tmp_path / "out", []
    monkeypatch.setattr(
        sharding, "wait_for_all", lambda name: calls.append((name, (out / "claim.json").exists()))
    )
    pseudo_label.pseudo_label(teacher, images, out)
    assert calls[:2] == [("checked claim", False), ("claimed", True)]
