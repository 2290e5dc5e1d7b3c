"""The evaluator scores every example once, in order, at any batch size."""

import jax
import numpy as np
import pytest
import toy

from maknet_jax.data import records
from maknet_jax.evaluation import protocol
from maknet_jax.evaluation.evaluator import Evaluator, Scores
from maknet_jax.runs import build
from maknet_jax.training import sharding

WEIGHTS = np.random.default_rng(0).normal(size=(3, 4)) / 500


def example(number):
    image = np.random.default_rng(number).integers(-1000, 1000, (4, 4, 3), np.int16)
    labels = np.array([number >> bit & 1 for bit in range(4)], np.uint8)
    mask = np.ones(4, np.uint8)
    mask[number % 4] = number % 3 > 0
    return records.Example(f"name {number}", image, labels, mask, {})


def logits(images):
    return (np.float64(images).mean(axis=(1, 2)) @ WEIGHTS).astype(np.float32)


def predict(variables, batch):
    """A linear network; ids are not arrays and are not returned."""
    rows = {key: batch[key] for key in ("labels", "label_mask", "weight", "index")}
    return rows | {"logits": logits(batch["image"]) + variables}


SOURCE = [example(number) for number in range(7)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 8])
def test_each_example_is_scored_once_at_any_batch_size(batch_size):
    scored = []
    result = Evaluator(SOURCE, predict, batch_size=batch_size).scores(0.25, scored.append)
    assert sum(scored) == 7
    images = np.stack([row.image for row in SOURCE])
    theirs = 1 / (1 + np.exp(-np.float64(logits(images) + np.float32(0.25))))
    np.testing.assert_allclose(result.scores, theirs, rtol=1e-6)
    assert result.scores.dtype == np.float32
    np.testing.assert_array_equal(result.labels, [row.labels for row in SOURCE])
    np.testing.assert_array_equal(result.label_mask, [row.label_mask > 0 for row in SOURCE])


def test_two_processes_share_a_split_and_both_get_all_scores():
    """The rows of the two processes are concatenated, as `sharding.gather` does."""
    halves = {}

    def collect(number):
        def keep(variables, batch):
            halves.setdefault(number, []).append(predict(variables, batch))
            return halves[number][-1]

        return keep

    for number in (0, 1):
        options = {"batch_size": 4, "process_index": number, "process_count": 2}
        with pytest.raises(RuntimeError):
            Evaluator(SOURCE, collect(number), **options).scores(0.0)
    assert len(halves[0]) == len(halves[1]) == 2  # collective steps need equal numbers of batches
    whole = [
        {key: np.concatenate([one[key], two[key]]) for key in one}
        for one, two in zip(halves[0], halves[1], strict=True)
    ]
    options = {"batch_size": 4, "process_index": 0, "process_count": 2}
    result = Evaluator(SOURCE, lambda *_: whole.pop(0), **options).scores(0.0)
    alone = Evaluator(SOURCE, predict, batch_size=4).scores(0.0)
    np.testing.assert_array_equal(result.scores, alone.scores)
    np.testing.assert_array_equal(result.labels, alone.labels)


def test_a_missing_row_is_an_error():
    def forgetful(variables, batch):
        return {key: value[:-1] for key, value in predict(variables, batch).items()}

    with pytest.raises(RuntimeError, match="scored twice or not at all"):
        Evaluator(SOURCE, forgetful, batch_size=7).scores(0.0)


def test_extreme_logits_give_finite_scores():
    def far(variables, batch):
        return predict(variables, batch) | {"logits": np.float32([[-1e4, -100, 100, 1e4]] * 7)}

    result = Evaluator(SOURCE, far, batch_size=7).scores(0.0).scores
    np.testing.assert_allclose(result, [[0, 0, 1, 1]] * 7, atol=1e-12)


def test_a_label_that_cannot_be_scored_is_never_predicted():
    scores = np.float32([[0.9, 0.8], [0.2, 0.9], [0.7, 0.9]])
    labels = np.float32([[1, 0], [0, 0], [1, 0]])
    result = Scores(scores, labels, np.ones((3, 2), bool)).thresholds()
    assert result.tolist() == [0.3, protocol.NEVER]


def test_a_report_contains_the_numbers_of_the_protocol():
    parents = ((), (0,), (), ())
    scores = Evaluator(SOURCE, predict, batch_size=4).scores(0.0)
    report = protocol.evaluate(
        scores.scores, scores.labels, scores.thresholds(), parents, mask=scores.label_mask
    )
    assert scores.report(scores.thresholds(), parents) == report
    assert report.summary["examples"] == 7
    assert scores.report([1.0] * 4, parents).summary["recall"] == 0.0


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    data = toy.write(tmp_path_factory.mktemp("data") / "toy", train=2)
    config = toy.config(data, "linear")
    assembly = build.assemble(config, 4, sharding.data_mesh())
    return (
        config,
        assembly.model,
        assembly.create(0).variables,
        records.open_dataset(data).source("val"),
    )


@pytest.mark.parametrize("devices, batch_size", [(1, 3), (1, 16), (2, 4), (8, 8)])
def test_a_network_scores_the_same_on_any_mesh_at_any_batch_size(network, devices, batch_size):
    config, model, variables, source = network
    mesh = sharding.data_mesh(jax.devices()[:devices])
    predict = build.assemble(config, 4, mesh).predict
    result = Evaluator(source, predict, batch_size=batch_size).scores(
        sharding.put_state(mesh, variables)
    )
    assert len(result.scores) == len(source) == toy.VAL
    images = np.stack([source[k].image for k in range(toy.VAL)])
    unit = np.clip((images + 1024.0) / 4095.0, 0, 1)
    theirs = model.apply(variables, unit, train=False).logits
    np.testing.assert_allclose(result.scores, jax.nn.sigmoid(theirs), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result.labels, [source[k].labels for k in range(toy.VAL)])


def test_images_are_not_copied_back_to_the_host(network):
    config, model, variables, _ = network
    mesh = sharding.data_mesh()
    batch = {"image": np.zeros((8, toy.SIZE, toy.SIZE, 3), np.int16), "index": np.arange(8)}
    predict = build.assemble(config, 4, mesh).predict
    result = predict(sharding.put_state(mesh, variables), batch)
    assert set(result) == {"logits", "index"}
