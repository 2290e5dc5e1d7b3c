"""Opening checks the shards cheaply; `maknet verify` reads everything."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import test_shards
import toy

from maknet_jax import cli, files, train, verify
from maknet_jax.data import records, shards
from maknet_jax.errors import InputError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared data set: three shards of 6 records in train, two of 6 in val."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_RECORDS", 6)
        splits = {
            "train": [test_shards.Unit(n) for n in (1, 2, 3, 4, 5, 6, 8, 9, 10)],
            "val": [test_shards.Unit(n) for n in (11, 12, 13, 15, 16, 17)],
        }
        test_shards.write(out, splits=splits)
    return out


@pytest.fixture
def copy(prepared, tmp_path):
    return pathlib.Path(shutil.copytree(prepared, tmp_path / "data"))


def paths(folder, split):
    return sorted((folder / split).iterdir())


def edit(folder, change, **fields):
    """Changes `dataset.json`; `fields` are replaced after that."""
    info = files.read_json(folder / "dataset.json")
    change(info)
    files.write_json(folder / "dataset.json", info | fields)


def forget_digests(info):
    """As an earlier version wrote it."""
    info.pop("content", None)
    for split in info["splits"].values():
        for shard in split["shards"]:
            shard.pop("first", None)


def open_all(folder):
    dataset = records.open_dataset(folder)
    return [len(dataset.source(split)) for split in dataset.info["splits"]]


def problems(folder):
    return [check.item for check in verify.verify(folder) if check.problem]


def test_intact_data_pass(copy):
    assert open_all(copy) == [18, 12]
    checks = verify.verify(copy)
    assert [check.item for check in checks if check.problem or check.remark] == []
    assert len(checks) == 1 + 5 + 2 and checks[1].content == "6 records"
    assert cli.main(["verify", str(copy)]) == 0


def test_data_of_an_earlier_version_pass_with_a_remark(copy):
    edit(copy, forget_digests)
    assert open_all(copy) == [18, 12] and problems(copy) == []
    assert "earlier version" in verify.table(verify.verify(copy)).splitlines()[-1]

    def forget_all(info):
        for split in info["splits"].values():
            for shard in split["shards"]:
                del shard["digest"]

    edit(copy, forget_all)
    assert open_all(copy) == [18, 12] and problems(copy) == []
    assert sum(bool(check.remark) for check in verify.verify(copy)) == 1 + 5


def swap_files(folder):
    one, two = paths(folder, "train")[0], paths(folder, "val")[0]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def take_another_splits_shard(folder):
    shutil.copy(paths(folder, "val")[1], paths(folder, "train")[1])


def shorten(folder):
    source = records.open_dataset(folder).source("train")
    payloads = [source.payload(number) for number in range(5)]
    records.write_shard(paths(folder, "train")[0], payloads)


@pytest.mark.parametrize("damage", [swap_files, take_another_splits_shard, shorten])
def test_shards_other_than_the_prepared_ones_are_refused(copy, damage):
    damage(copy)
    with pytest.raises(InputError, match=r"shard .*part-0000"):
        open_all(copy)
    assert problems(copy)
    assert cli.main(["verify", str(copy)]) == 2


def test_verify_finds_another_splits_shard_in_data_of_an_earlier_version(copy):
    edit(copy, forget_digests)
    take_another_splits_shard(copy)
    name = str(paths(copy, "train")[1].relative_to(copy))
    assert problems(copy)[0] == name


def reorder_labels(info):
    info["labels"].reverse()


def swap_names(info):
    one, two = info["splits"]["train"]["shards"][:2]
    one["file"], two["file"] = two["file"], one["file"]


def change_a_count(info):
    info["splits"]["train"]["count"] -= 1


def leave_the_folder(info):
    info["splits"]["train"]["shards"][0]["file"] = "../data/train/x.array_record"
    info["content"] = records.content_digest(info)


@pytest.mark.parametrize("change", [reorder_labels, swap_names, change_a_count, leave_the_folder])
def test_a_changed_description_is_refused(copy, change):
    edit(copy, change)
    with pytest.raises(InputError, match="dataset.json was changed"):
        open_all(copy)
    assert problems(copy) == ["dataset.json"]


def wrong_size(info):
    info["size"] = 16


def wrong_labels(info):
    info["labels"].pop()


@pytest.mark.parametrize("change", [wrong_size, wrong_labels])
def test_records_of_another_size_or_number_of_labels_are_refused(copy, change):
    """In data of an earlier version, whose description has no digest."""
    edit(copy, lambda info: (forget_digests(info), change(info)))
    with pytest.raises(InputError, match=r"part-00000.* not the \d+ of dataset.json"):
        open_all(copy)
    assert len(problems(copy)) >= 5


def test_verify_finds_one_flipped_bit_and_wrong_label_counts(copy):
    path = paths(copy, "train")[2]
    content = bytearray(path.read_bytes())
    pixels = test_shards.make(test_shards.Unit(10)).examples[1][0][-300:-290]
    content[content.find(pixels)] ^= 4
    path.write_bytes(content)
    edit(copy, lambda info: info["splits"]["val"]["label_counts"].reverse())
    edit(copy, forget_digests)
    assert problems(copy) == [str(path.relative_to(copy)), "split train", "split val"]


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"format": 1}', '{"format": 1, "splits": []}', "\x00\x01", ""]
)
def test_an_odd_dataset_json_is_one_line(copy, text):
    (copy / "dataset.json").write_text(text)
    with pytest.raises(InputError) as caught:
        open_all(copy)
    assert "\n" not in str(caught.value) and problems(copy) == ["dataset.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = toy.config(toy.write(folder / "data"), "linear", {"epochs": 2.0})
    train.train(config, folder / "run")
    return folder / "run"


def test_a_workdir_is_verified(run, tmp_path, monkeypatch):
    workdir = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    checks = verify.verify(workdir)
    assert [check for check in checks if check.problem or check.remark] == []
    items = [check.item for check in checks]
    assert items[:2] == ["config.json", "dataset.json"] and "metrics.jsonl" in items
    assert "checkpoints/10" in items and any(item.startswith("best/") for item in items)

    metadata = workdir / "checkpoints" / "10" / "content" / "metadata"
    content = json.loads(metadata.read_text())
    content["meta"]["thresholds"][0] /= 2
    metadata.write_text(json.dumps(content))
    (workdir / "summary.json").write_text("{")
    assert problems(workdir) == ["checkpoints/10", "summary.json"]
    (workdir / "config.json").write_text("[]")
    assert problems(workdir) == ["config.json, dataset.json"]
    assert cli.main(["verify", str(workdir)]) == 2


def test_pseudo_labels_and_bundles_are_verified(tmp_path, exported):
    images = toy.write_unlabelled(tmp_path / "images")
    pseudo = toy.write_pseudo(tmp_path / "pseudo", images)
    assert problems(pseudo) == [] and len(verify.verify(pseudo)) == 2
    rows = np.load(pseudo / "all.npy")
    rows["confidences"][0, 0] += 0.01
    np.save(pseudo / "all.npy", rows)
    assert problems(pseudo) == ["all.npy"]
    for text in ("[]", "{}", '{"shards": [1]}', "{"):
        (pseudo / "pseudo.json").write_text(text)
        assert problems(pseudo) == ["pseudo.json"]

    assert problems(exported) == [] and len(verify.verify(exported)) >= 4
    bundle = pathlib.Path(shutil.copytree(exported, tmp_path / "torso"))
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(content)
    assert problems(bundle) == ["torso"]


def test_what_is_none_of_these_is_one_line(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert cli.main(["verify", str(tmp_path / "absent")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
