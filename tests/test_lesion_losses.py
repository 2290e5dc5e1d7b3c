"""LesaNet's losses against plain loops that follow its published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maknet_jax import models
from maknet_jax.errors import InputError
from maknet_jax.models import Outputs
from maknet_jax.training import augment, lesion_losses, losses, sgd, sharding, state, step

LABELS = 7


def drawn(seed, rows=20):
    """Outputs and a batch: embeddings of length 1, some labels unknown, two rows of padding."""
    rng = np.random.default_rng(seed)
    logits, before = rng.normal(size=(2, rows, LABELS)).astype(np.float32) * 2
    embedding = rng.normal(size=(rows, 8)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    weight = np.ones(rows, np.float32)
    weight[-2:] = 0
    labels = (rng.random((rows, LABELS)) < 0.4).astype(np.float32)
    mask = ((rng.random((rows, LABELS)) < 0.8) | (labels > 0)).astype(np.float32)
    batch = {"labels": labels, "label_mask": mask, "weight": weight, "key": jax.random.key(seed)}
    return Outputs(logits, before, embedding), batch


def cross_entropy(logits, labels):
    p = 1 / (1 + np.exp(-np.float64(logits)))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p))


def test_the_similarity_is_common_labels_times_jaccard():
    labels = np.float32([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    theirs = np.zeros((4, 4))
    for i, a in enumerate(labels > 0):
        for j, b in enumerate(labels > 0):
            if (a | b).any():
                theirs[i, j] = (a & b).sum() * (a & b).sum() / (a | b).sum()
    assert theirs[0, 1] == pytest.approx(2 * 2 / 3)
    np.testing.assert_allclose(lesion_losses.similarity(labels), theirs, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_triplets_follow_the_sampling_rules(seed):
    _, batch = drawn(seed)
    labels = batch["labels"] * (np.arange(LABELS) < (2 if seed == 3 else LABELS))
    chosen = lesion_losses.choose_triplets(batch["key"], labels, batch["weight"], count=4000)
    alike = np.array(lesion_losses.similarity(labels))[:18, :18]
    np.fill_diagonal(alike, np.nan)
    pairs, anchors = {}, set()
    for a, p, n in np.stack(chosen, axis=1).tolist():
        anchors.add(a)
        assert a < 18 and p < 18 and n < 18 and p != a and n != a
        if (alike[a] >= 1).any():
            assert alike[a, p] >= 1
        else:
            assert alike[a, p] == np.nanmax(alike[a])
        if (alike[a] < alike[a, p]).any():
            assert alike[a, n] < alike[a, p]
        else:
            assert alike[a, n] == np.nanmin(alike[a])
        pairs.setdefault(a, (set(), set()))
        pairs[a][0].add(p)
        pairs[a][1].add(n)
    assert anchors == set(range(18))
    for a, (similar, _) in pairs.items():  # 200 draws per anchor reach every candidate
        candidates = set(np.flatnonzero(alike[a] >= 1).tolist())
        assert not candidates or similar == candidates


def test_the_triplet_loss_equals_torchs_on_the_same_triplets():
    outputs, batch = drawn(1)
    args = (batch["key"], outputs.features, batch["labels"], batch["weight"])
    value = lesion_losses.triplet_loss(*args, margin=0.3, count=500)
    chosen = lesion_losses.choose_triplets(args[0], args[2], args[3], count=500)
    a, p, n = (np.float64(outputs.features)[np.asarray(rows)] for rows in chosen)
    apart = [np.linalg.norm(a - other + 1e-6, axis=1) for other in (p, n)]
    assert float(value) == pytest.approx(np.maximum(apart[0] - apart[1] + 0.3, 0).mean(), rel=1e-5)
    gradient = jax.grad(lambda e: lesion_losses.triplet_loss(args[0], e, *args[2:]))(args[1])
    same = jnp.ones_like(args[1]) / np.sqrt(8)
    at_one_point = jax.grad(lambda e: lesion_losses.triplet_loss(args[0], e, *args[2:]))(same)
    assert np.isfinite(gradient).all() and np.isfinite(at_one_point).all()
    assert np.abs(gradient[:18]).max() > 0 and not np.any(gradient[18:])  # no padding
    two = args[3] * (np.arange(20) < 2)
    assert float(lesion_losses.triplet_loss(*args[:3], two)) == 0


def test_hard_examples_are_drawn_in_proportion_to_their_squared_error():
    """The mean of many draws is the mean weighted by (|p - y| sure)^2."""
    outputs, batch = drawn(2)
    sure = batch["label_mask"] * batch["weight"][:, None]
    value = lesion_losses.hard_examples(
        batch["key"], outputs.logits, batch["labels"], sure, draws=400_000
    )
    p = 1 / (1 + np.exp(-np.float64(outputs.logits)))
    chance = (np.abs(p - batch["labels"]) * sure) ** 2
    expected = (chance * cross_entropy(outputs.logits, batch["labels"])).sum() / chance.sum()
    assert float(value) == pytest.approx(expected, rel=0.01)
    none = lesion_losses.hard_examples(
        batch["key"], outputs.logits, batch["labels"], 0 * sure, draws=100
    )
    assert float(none) == 0


def test_uncertain_elements_are_never_sampled():
    outputs, batch = drawn(2)
    sure = np.zeros((20, LABELS), np.float32)
    sure[3, 4] = 1
    value = functools.partial(lesion_losses.hard_examples, batch["key"], draws=50)
    theirs = cross_entropy(outputs.logits, batch["labels"])[3, 4]
    assert float(value(outputs.logits, batch["labels"], sure)) == pytest.approx(theirs, rel=1e-5)
    gradient = jax.grad(lambda x: value(x, batch["labels"], sure))(outputs.logits)
    assert np.argwhere(gradient).tolist() == [[3, 4]]


def loss_fn(**options):
    exclusive = np.zeros((LABELS, LABELS), bool)
    exclusive[0, 1] = exclusive[1, 0] = True
    pos, neg = losses.class_weights(np.arange(1, LABELS + 1), 20)
    options = {"pos_weight": pos, "neg_weight": neg, "exclusive": exclusive} | options
    return lesion_losses.lesion_loss_fn(**options)


def test_the_loss_is_the_sum_of_its_parts_with_the_published_weights():
    outputs, batch = drawn(5)
    loss, metrics = loss_fn()(outputs, batch)
    parts = {"loss_before_spl": 1, "loss_after_spl": 1, "loss_rhem": 1, "loss_triplet": 5}
    assert float(loss) == pytest.approx(sum(w * float(metrics[n]) for n, w in parts.items()))
    assert set(metrics) == {"loss", *parts}
    pos, neg = losses.class_weights(np.arange(1, LABELS + 1), 20)
    labels, known = batch["labels"], batch["label_mask"] * batch["weight"][:, None]
    weights = labels * pos + (1 - labels) * neg
    theirs = (weights * cross_entropy(outputs.logits, labels) * known).sum() / known.sum()
    assert float(metrics["loss_after_spl"]) == pytest.approx(theirs, rel=1e-5)
    again, _ = loss_fn()(outputs, batch)
    other, _ = loss_fn()(outputs, batch | {"key": jax.random.key(99)})
    assert float(again) == float(loss) != float(other)


def test_only_excluded_labels_are_hard_negatives():
    outputs, batch = drawn(5)
    labels = np.zeros_like(batch["labels"])
    labels[:, 0] = 1
    mask = np.ones_like(labels)

    def rhem(before):
        changed = outputs._replace(scores_before_spl=before)
        return loss_fn()(changed, batch | {"labels": labels, "label_mask": mask})[1]["loss_rhem"]

    gradient = np.asarray(jax.grad(rhem)(outputs.scores_before_spl))
    assert np.flatnonzero(gradient.any(axis=0)).tolist() == [0, 1]  # 0 excludes 1
    assert not gradient[18:].any()


def test_padding_and_unknown_labels_do_not_count():
    outputs, batch = drawn(6)
    loss, _ = loss_fn()(outputs, batch)
    labels = np.where(batch["label_mask"] > 0, batch["labels"], 0)
    labels[18:] = 1 - labels[18:]
    corrupted = Outputs(*(np.concatenate([part[:18], -part[18:]]) for part in outputs))
    again, _ = loss_fn()(corrupted, batch | {"labels": labels})
    assert float(loss) == pytest.approx(float(again), rel=1e-6)


@pytest.mark.parametrize("logit, label", [(20.0, 0.0), (-20.0, 1.0)])
def test_probabilities_are_clamped_as_in_the_published_code(logit, label):
    """torch: p.clamp(1e-7, 1 - 1e-7), whose gradient is 0 beyond the bounds."""
    outputs, batch = drawn(5)
    labels = np.full_like(batch["labels"], label)
    batch |= {"labels": labels, "label_mask": np.ones_like(labels)}

    def parts(scores):
        changed = outputs._replace(scores_before_spl=scores, logits=scores)
        unit = {"pos_weight": 1.0, "neg_weight": 1.0, "triplet_weight": 0.0}
        loss, metrics = loss_fn(**unit)(changed, batch)
        return loss, metrics

    scores = np.full_like(outputs.logits, logit)
    (_, metrics), gradient = jax.value_and_grad(parts, has_aux=True)(scores)
    for name in ("loss_before_spl", "loss_after_spl"):
        assert float(metrics[name]) == pytest.approx(-np.log(1e-7), rel=1e-5)
    assert not np.any(gradient)
    _, gradient = jax.value_and_grad(parts, has_aux=True)(scores * 0.8)  # 16.0: not clamped
    assert np.abs(gradient[:18]).min() > 0


def test_fewer_than_one_draw_is_refused():
    with pytest.raises(InputError, match="rhem_draws 0 .*triplets 5000"):
        loss_fn(rhem_draws=0)


def test_lesanets_step_draws_on_the_device_and_is_the_same_on_1_and_8_devices():
    trunk = {"stem": 8, "blocks": (1,), "growth_rates": (8,), "widths": (8,)}
    model = models.build(
        "lesanet", LABELS, trunk="maknet", trunk_options=trunk, units=8, embedding=8
    )
    optimizer = sgd.sgd(0.01)
    start = state.create(model, optimizer, size=32, seed=0)
    rng = np.random.default_rng(0)
    batch = drawn(3, rows=16)[1]
    del batch["key"]
    batch |= {
        "image": rng.normal(0, 300, (16, 32, 32, 3)).astype(np.int16),
        "index": np.arange(16, dtype=np.int32),
        "box": np.float32([[8, 8, 20, 24]] * 16),
    }
    to_input = functools.partial(augment.to_unit, window=(-1024.0, 3071.0))
    results = []
    for count in (1, 8):
        mesh = sharding.data_mesh(jax.devices()[:count])
        whole, rows = sharding.replicated(mesh), sharding.split(mesh)
        train_step = jax.jit(
            step.make_train_step(model, loss_fn(), optimizer, to_input=to_input),
            in_shardings=(whole, rows, whole),
            out_shardings=(whole, whole),
        )
        current, key = sharding.put_state(mesh, start), jax.device_put(jax.random.key(1), whole)
        with jax.transfer_guard("disallow"):
            for _ in range(3):
                with jax.transfer_guard("allow"):
                    on_mesh = sharding.put_batch(mesh, batch)
                current, metrics = train_step(current, on_mesh, key)
        results.append((jax.tree.map(np.asarray, current.params), float(metrics["loss"])))
    (one, loss), (eight, other) = results
    assert loss == pytest.approx(other, rel=1e-3)  # rounding may move a draw to its neighbour
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    del batch["box"]
    with pytest.raises(InputError, match="box .*--lesions"):
        train_step(start, batch, jax.random.key(1))


def test_the_key_of_the_loss_depends_on_seed_and_step():
    model, optimizer = models.build("linear", 3, edge=4), sgd.sgd(0.01)
    start = state.create(model, optimizer, size=8, seed=0)
    batch = {"image": np.zeros((2, 8, 8, 3), np.int16)}

    def draw(outputs, batch):
        value = jax.random.uniform(batch["key"])
        return value + 0 * outputs.logits.sum(), {"value": value}

    to_input = functools.partial(augment.to_unit, window=(-1024.0, 3071.0))
    train_step = jax.jit(step.make_train_step(model, draw, optimizer, to_input=to_input))
    values = [
        float(
            train_step(start._replace(step=jnp.int32(number)), batch, jax.random.key(seed))[1][
                "value"
            ]
        )
        for number, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert values[0] == values[1] and len(set(values)) == 3
