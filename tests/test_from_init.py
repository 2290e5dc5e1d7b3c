"""Fine-tuning takes the network of its initial weights, and the scores of shared labels."""

import shutil

import jax
import numpy as np
import pytest
import toy

import maknet_jax
from maknet_jax import files, train
from maknet_jax.data.labels import Label, Vocabulary
from maknet_jax.errors import InputError
from maknet_jax.models import pretrained, vgg
from maknet_jax.runs import config as configs
from maknet_jax.runs import setup, workdir
from maknet_jax.training import transfer

FINETUNE = {"epochs": 0.4, "evaluate_every": 0.4, "log_every": 1, "checkpoint_every": 1}
FINETUNE |= {"data.size": toy.SIZE, "data.batch_size": 8}
OTHER = Vocabulary(tuple(map(Label, ("bottom right", "heart", "top left"))))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A toy run with a stem, blocks and widths of its own."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train.train(toy.config(data, "smoke", {"epochs": 1.6}), folder)
    return folder


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "base"
    maknet_jax.export(base, out, zipped=True)
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Data with three labels, two of which the base has, in another order."""
    out = toy.write(tmp_path_factory.mktemp("other") / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "VOCABULARY", OTHER)
        original = toy.example

        def example(*args, **options):
            result = original(*args, **options)
            return type(result)(
                result.id, result.image, result.labels[:3], result.label_mask[:3], {}
            )

        patch.setattr(toy, "example", example)
        shutil.rmtree(out)
        return toy.write(out)


def finetune(data, init, **changes):
    values = FINETUNE | {"data.path": str(data), "init.path": str(init)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load("finetune", [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("kind", ["workdir", "bundle", "zip"])
def test_any_widths_are_fine_tuned_without_a_config(data, base, exported, tmp_path, kind):
    source = {"workdir": base, "bundle": exported, "zip": f"{exported}.zip"}[kind]
    summary = train.train(finetune(data, source), tmp_path / "run")
    config = configs.load(tmp_path / "run")
    expected = configs.load(base).model.to_dict()
    assert config.model.name == "maknet" and expected["options"]["stem"] == 8
    # The options that the config lists replace those of the weights' network.
    assert config.model.options.to_dict() == expected["options"] | {"dropout_rate": 0.5}
    assert summary["init"]["fresh"] == ["classifier", "spl"]
    assert summary["init"]["digest"] == workdir.open_weights(base).metadata["digest"]
    assert workdir.open_run(tmp_path / "run").step == 2


def test_a_finished_fine_tuning_no_longer_needs_its_base(data, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    config = finetune(data, copy)
    first = train.train(config, tmp_path / "run")
    shutil.rmtree(copy)
    assert train.train(config, tmp_path / "run")["init"] == first["init"]


def test_a_moved_base_is_compared_by_its_digest(data, base, exported, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    train.train(finetune(data, copy), tmp_path / "run")
    copy.rename(tmp_path / "moved")
    for same in (tmp_path / "moved", exported):
        train.train(finetune(data, same), tmp_path / "run")
    train.train(toy.config(data, "smoke", {"epochs": 0.8, "seed": 5}), tmp_path / "another")
    with pytest.raises(InputError, match=r"initial_weights"):
        train.train(finetune(data, tmp_path / "another"), tmp_path / "run")
    with pytest.raises(InputError, match="nowhere not found"):
        train.train(finetune(data, tmp_path / "nowhere"), tmp_path / "run")


def test_a_run_of_an_earlier_version_without_a_checkpoint_starts_again(data, base, tmp_path):
    run, config = (
        tmp_path / "run",
        toy.config(data, "smoke", {"epochs": 0.2, "init.path": str(base)}),
    )
    first = train.train(config, run)
    stored = files.read_json(run / "dataset.json")
    assert stored["initial_weights"] == first["init"]["digest"]
    for folder in workdir.FOLDERS.values():  # killed before its first checkpoint
        shutil.rmtree(run / folder)
    for record in ({}, {"initial_weights": "of other weights"}):
        old = {key: value for key, value in stored.items() if key != "initial_weights"}
        files.write_json(run / "dataset.json", old | record)
        if record:
            with pytest.raises(InputError, match="initial_weights"):
                train.train(config, run)
        else:
            assert train.train(config, run)["init"]["digest"] == first["init"]["digest"]
            for folder in workdir.FOLDERS.values():
                shutil.rmtree(run / folder)


def test_a_file_of_weights_records_its_network(data, tmp_path):
    config = configs.load("vgg16", ["data.size=32"])
    from maknet_jax.runs import build

    model = build.build_model(config, 1)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    )
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes))
    del arrays["params"]["classifier"]
    assert len(arrays["params"]) == sum(map(len, vgg.STAGES)) and "vgg16" in pretrained.LAYERS
    path = tmp_path / "vgg16.safetensors"
    transfer.write(path, arrays["params"], arrays["batch_stats"], {"model": "vgg16"})
    prepared = setup.set_up(finetune(data, path), tmp_path / "run")
    assert type(prepared.assembly.model).__name__ == "VGG16"
    assert prepared.assembly.model.dropout_rate == 0.5
    transfer.write(path, arrays["params"], arrays["batch_stats"], {})
    with pytest.raises(InputError, match="does not name its network: set config model"):
        setup.set_up(finetune(data, path), tmp_path / "run")


def test_fine_tuning_without_weights_is_refused(data, tmp_path):
    with pytest.raises(
        InputError, match="from_init takes the network of init.path, which is empty"
    ):
        train.train(finetune(data, ""), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shared_labels_keep_their_scores(base, other, tmp_path):
    prepared = setup.set_up(finetune(other, base, init__shared_labels=True), tmp_path / "run")
    assert (
        prepared.init["shared_labels"] == ["bottom right", "top left"]
        and prepared.init["fresh"] == []
    )
    assert prepared.assembly.model.num_classes == 3
    state = prepared.assembly.create(0, prepared.place)
    fresh = prepared.assembly.create(0, None)
    old = workdir.open_weights(base)
    here, there = [0, 2], [old.vocabulary.index[name] for name in ("bottom right", "top left")]
    new, before, initial = state.params, old.params, fresh.params
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(
            new["classifier"][leaf][..., here], before["classifier"][leaf][..., there]
        )
        np.testing.assert_array_equal(
            new["classifier"][leaf][..., 1], initial["classifier"][leaf][..., 1]
        )
    kernel, then = new["spl"]["dense"]["kernel"], before["spl"]["dense"]["kernel"]
    np.testing.assert_array_equal(kernel[np.ix_(here, here)], then[np.ix_(there, there)])
    np.testing.assert_array_equal(kernel[1], [0, 1, 0])  # the identity, as a fresh one
    np.testing.assert_array_equal(kernel[:, 1], [0, 1, 0])
    np.testing.assert_array_equal(
        new["spl"]["dense"]["bias"][jax.numpy.array(here)], before["spl"]["dense"]["bias"][there]
    )
    # Where the score propagation of the base mixes no dropped label in, logits are the same.
    summary = train.train(finetune(other, base, init__shared_labels=True), tmp_path / "run")
    assert summary["init"]["shared_labels"] == ["bottom right", "top left"]


def test_all_labels_shared_start_as_the_base_ended(base, data, tmp_path):
    prepared = setup.set_up(finetune(data, base, init__shared_labels=True), tmp_path / "run")
    state, old = prepared.assembly.create(0, prepared.place), workdir.open_weights(base)
    jax.tree.map(np.testing.assert_array_equal, dict(state.params), dict(old.params))


def test_invalid_shared_labels_are_refused(base, data, other, tmp_path):
    def refused(match, config):
        with pytest.raises(InputError, match=match):
            train.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("both True", finetune(data, base, init__shared_labels=True, init__head=True))
    refused("keep the shared ones with init.shared_labels", finetune(other, base, init__head=True))
    renamed = shutil.copytree(other, tmp_path / "renamed")
    info = files.read_json(renamed / "dataset.json")
    for label in info["labels"]:
        label["name"] += " of another"
    files.write_json(renamed / "dataset.json", info)
    refused("share no label", finetune(renamed, base, init__shared_labels=True))
    refused(
        r"classifier/kernel is \(48, 4\) in the weights, .*set init.shared_labels to False",
        finetune(
            other, linear_base(data, tmp_path), init__shared_labels=True, model__name="maknet"
        ),
    )


def test_a_head_without_score_propagation_does_not_fit_one_with_it():
    head = {"classifier": {"kernel": np.zeros((5, 2)), "bias": np.zeros(2)}}
    spl = {"spl": {"dense": {"kernel": np.eye(2), "bias": np.zeros(2)}}}
    for here, there in ((head | spl, head), (head, head | spl), (head, {})):
        with pytest.raises(InputError, match="no (spl|classifier) of the same structure"):
            transfer.share_head({"params": here}, there, [(0, 0)], 2)


def linear_base(data, tmp_path):
    folder = tmp_path / "linear"
    train.train(toy.config(data, "linear", {"epochs": 0.4}), folder)
    return folder
