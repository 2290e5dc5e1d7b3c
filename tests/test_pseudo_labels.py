"""Pseudo-labels: their selection, their shards, and the source that students read."""

import itertools
import pickle

import numpy as np
import pytest
import toy

from maknet_jax import files
from maknet_jax.data import pseudo_labels, records
from maknet_jax.errors import InputError

CLOSE = pseudo_labels.CLOSE["float32"]
NONE = np.zeros((6, 6), bool)


def slowly(values, exclusive, top, threshold):
    """`select` for one image, label by label and pair by pair."""
    order = sorted(range(len(values)), key=lambda k: (-values[k], k))
    chosen = []
    for column in order[:top]:
        if values[column] > threshold and not any(exclusive[column][k] for k in chosen):
            chosen.append(column)
    close = any(abs(values[k] - threshold) < CLOSE for k in order[:top])
    for (one, first), (two, second) in itertools.combinations(enumerate(order[: top + 1]), 2):
        tie = values[first] - values[second] < CLOSE
        counts = values[second] > threshold - CLOSE
        cut = one < top <= two
        close |= bool(tie and counts and (cut or exclusive[first][second]))
    return chosen, close


@pytest.mark.parametrize("size, top", [(9, 4), (9, 9), (9, 15), (9, 1), (1, 15)])
@pytest.mark.parametrize("step", [0.1, 3e-6, None])  # between confidences: ties, near ties, neither
def test_select_equals_a_slow_loop(size, top, step):
    rng = np.random.default_rng([size, top])
    pairs = rng.random((size, size)) < 0.2
    exclusive = (pairs | pairs.T) & ~np.eye(size, dtype=bool)
    values = rng.random((300, size))
    if step is not None:
        values = 0.5 + step * np.round(values * 10 - 5)
    values = values.astype(np.float32)
    selected, close = pseudo_labels.select(values, exclusive, top=top, threshold=0.5)
    assert selected.shape == (300, min(top, size)) and selected.dtype == np.int16
    expected = [slowly(row, exclusive, top, np.float32(0.5)) for row in values]
    assert [row[row >= 0].tolist() for row in selected] == [columns for columns, _ in expected]
    assert close.tolist() == [flag for _, flag in expected]
    assert not ((selected[:, 1:] >= 0) & (selected[:, :-1] < 0)).any()  # no gap before a label
    if step is not None and size > 1:
        assert 0 < close.sum()


def test_thresholds_of_labels_equal_a_slow_loop():
    rng = np.random.default_rng(4)
    pairs = rng.random((9, 9)) < 0.2
    exclusive = (pairs | pairs.T) & ~np.eye(9, dtype=bool)
    values = rng.random((300, 9)).astype(np.float32)
    limits = np.array([0.1, 0.9, 0.5, 1, 0.3, 0.7, 0, 0.5, 0.2], np.float32)
    selected, _ = pseudo_labels.select(values, exclusive, top=4, threshold=limits)
    for row, chosen in zip(values, selected, strict=True):
        expected: list[int] = []
        for column in np.argsort(-row)[:4].tolist():
            if row[column] > limits[column] and not exclusive[column][expected].any():
                expected.append(column)
        assert chosen[chosen >= 0].tolist() == expected
    assert not (selected == 3).any()  # a threshold of 1


@pytest.mark.parametrize(
    "limits, row, close",
    [
        ([0.2, 0.9], [0.8, 0.3], False),
        ([0.2, 0.9], [0.2 + CLOSE / 2, 0.1], True),  # at its own threshold
        ([0.9, 0.2], [0.3 + CLOSE / 2, 0.3], True),  # a tie at the cut after the first label
        ([0.2, 0.9], [0.3 + CLOSE / 2, 0.3], True),
        ([1, 0.9], [1 - CLOSE / 2, 0.3], False),  # of a label that is never given
        ([0.9, 0.4], [0.3 + CLOSE / 2, 0.3], False),  # a tie of labels that are too weak
    ],
)
def test_images_are_close_by_the_thresholds_of_their_labels(limits, row, close):
    none, values = np.zeros((2, 2), bool), np.array([row], np.float32)
    _, flags = pseudo_labels.select(values, none, top=1, threshold=np.array(limits))
    assert flags.tolist() == [close]


@pytest.mark.parametrize("precision", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("digits", [1, 7])  # with many equal confidences, and without
def test_precise_thresholds_equal_a_search(precision, digits):
    rng = np.random.default_rng(digits)
    confidences = (0.1 + 0.9 * rng.random((200, 6))).round(digits).astype(np.float32)
    labels = rng.random((200, 6)) < confidences**2
    known = rng.random((200, 6)) < 0.8
    labels[:, 4] = False  # nobody has it
    known[:, 4] = True
    labels[:, 5] = confidences[:, 5] < 0.2  # never precise
    labels[:, 3] = True  # everybody has it
    thresholds = pseudo_labels.thresholds_for_precision(
        confidences, labels, known, precision=precision, default=0.5
    )
    for column in range(6):
        judged = known[:, column]
        values, truth = confidences[judged, column], labels[judged, column]
        reached = [
            value for value in set(values.tolist()) if truth[values >= value].mean() >= precision
        ]
        if column in (3, 4):
            assert thresholds[column] == 0.5
        elif not reached:
            assert thresholds[column] == 1
        else:
            assert ((values > thresholds[column]) == (values >= min(reached))).all()
    assert thresholds[5] == 1
    assert (thresholds[:3] < 1).all() or precision == 1.0


def test_a_precise_threshold_lies_between_two_confidences():
    confidences = np.array([[0.9], [0.8], [0.4], [0.3]], np.float32)
    labels = np.array([[1], [1], [0], [1]])
    known = np.ones((4, 1), bool)

    def threshold(precision):
        rule = {"precision": precision, "default": 0.5}
        return pseudo_labels.thresholds_for_precision(confidences, labels, known, **rule)[0]

    assert threshold(1.0) == pytest.approx(0.6)
    assert threshold(0.75) == pytest.approx(0.15)
    below = np.nextafter(np.float32(0.5), np.float32(0))  # no number in between
    confidences[:2, 0], labels[1] = (0.5, below), 0
    assert threshold(1.0) == below
    confidences[1:, 0], labels[:, 0] = 0.5, (0, 1, 1, 0)  # equal confidences
    confidences[0] = 0.9
    assert threshold(0.6) == 1


def test_a_confidence_at_the_threshold_is_not_selected():
    for threshold in (0.0, 0.3, 0.5, 0.7):
        at = np.float32(threshold)
        above = np.nextafter(at, np.float32(1))
        row = np.array([[at, above, 0, 0, 0, 0]], np.float32)
        selected, close = pseudo_labels.select(row, NONE, threshold=threshold)
        assert selected[0].tolist() == [1, -1, -1, -1, -1, -1] and close.tolist() == [True]


def test_ties_go_to_the_lower_column():
    row = np.full((1, 6), 0.75, np.float32)
    assert pseudo_labels.select(row, NONE, top=3)[0].tolist() == [[0, 1, 2]]


def test_an_excluded_label_excludes_nothing():
    """0 excludes 1, so that 2, which only 1 excludes, is selected."""
    exclusive = NONE.copy()
    for one, two in ((0, 1), (1, 2)):
        exclusive[one, two] = exclusive[two, one] = True
    row = np.array([[0.9, 0.8, 0.7, 0.1, 0.1, 0.1]], np.float32)
    assert pseudo_labels.select(row, exclusive)[0][0].tolist() == [0, 2, -1, -1, -1, -1]
    # With the middle first, it excludes both ends.
    row = np.array([[0.7, 0.6, 0.8, 0.1, 0.1, 0.1]], np.float32)
    assert pseudo_labels.select(row, exclusive)[0][0].tolist() == [2, 0, -1, -1, -1, -1]


def test_a_small_change_affects_close_images_only():
    """Smaller changes of the confidences never change an image that is not close."""
    rng = np.random.default_rng(1)
    pairs = rng.random((8, 8)) < 0.3
    exclusive = (pairs | pairs.T) & ~np.eye(8, dtype=bool)
    values = (0.5 + 4e-6 * rng.integers(-40, 40, (500, 8))).astype(np.float32)

    def sets(values):
        selected, close = pseudo_labels.select(values, exclusive, top=5)
        return [frozenset(row[row >= 0].tolist()) for row in selected], close

    before, close = sets(values)
    changed = np.zeros(500, bool)
    for _ in range(20):
        shifted = values + rng.uniform(-4.9e-6, 4.9e-6, values.shape).astype(np.float32)
        changed |= [a != b for a, b in zip(before, sets(shifted)[0], strict=True)]
    assert changed.sum() > 50 and not (changed & ~close).any() and not close.all()


@pytest.fixture
def confidences():
    return np.random.default_rng(3).random((40, 6)).astype(np.float32) ** 2


def test_rows_hold_the_selection_and_survive_a_round_trip(confidences, tmp_path):
    columns, _ = pseudo_labels.select(confidences, NONE, top=4, threshold=0.6)
    numbers = np.arange(100, 140)
    rows = pseudo_labels.rows_of(numbers, columns, confidences, top=4)
    selected = [k for k in range(40) if confidences[k].max() > 0.6]
    assert 0 < len(selected) < 40 and rows["index"].tolist() == [100 + k for k in selected]
    for row, k in zip(rows, selected, strict=True):
        known = [column for column in row["labels"].tolist() if column >= 0]
        assert known == columns[k][columns[k] >= 0].tolist()
        np.testing.assert_array_equal(row["confidences"][: len(known)], confidences[k, known])
        assert not row["confidences"][len(known) :].any()
    digest = pseudo_labels.write_rows(tmp_path / "a.npy", rows)
    again = pseudo_labels.read_rows(tmp_path / "a.npy", digest)
    assert again.dtype == rows.dtype == pseudo_labels.row_dtype(4)
    assert again.tobytes() == rows.tobytes()
    assert pseudo_labels.write_rows(tmp_path / "b.npy", rows) == digest
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


def test_places_beyond_the_vocabulary_stay_empty(confidences):
    columns, _ = pseudo_labels.select(confidences, NONE, top=15)
    rows = pseudo_labels.rows_of(np.arange(40), columns, confidences, top=15)
    assert rows["labels"].shape[1] == 15 and (rows["labels"][:, 6:] == -1).all()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "folder"])
def test_a_damaged_shard_is_rejected_in_one_line(tmp_path, damage):
    path = tmp_path / "a.npy"
    rows = np.zeros(20, pseudo_labels.row_dtype(4))
    digest = pseudo_labels.write_rows(path, rows)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        payload = {"flipped": content, "cut": content[:-9], "empty": b""}[damage]
        path.write_bytes(payload)
    with pytest.raises(InputError, match=r"a\.npy") as error:
        pseudo_labels.read_rows(path, digest)
    assert "\n" not in str(error.value)


def rows_with(labels, confidences):
    rows = np.zeros(len(labels), pseudo_labels.row_dtype(2))
    rows["index"], rows["labels"], rows["confidences"] = np.arange(len(labels)), labels, confidences
    return rows


def test_balanced_takes_the_most_confident_of_each_label_and_repeats_them():
    rows = rows_with(
        [[0, -1], [0, 1], [1, 0], [0, -1], [3, -1]],
        [[0.6, 0], [0.9, 0.7], [0.8, 0.7], [0.7, 0], [0.6, 0]],
    )
    order = pseudo_labels.balanced(rows, 5, 3, seed=0)
    # Label 0: images 1, 2 and 3 (ties go to the first); 1: images 2, 1 and 2 again; 3: image 4.
    assert sorted(order.tolist()) == sorted([1, 2, 3, 2, 1, 2, 4, 4, 4])
    assert pseudo_labels.balanced(rows, 5, 3, seed=0).tolist() == order.tolist()
    others = {tuple(pseudo_labels.balanced(rows, 5, 3, seed=seed)) for seed in range(5)}
    assert len(others) > 1 and {tuple(sorted(other)) for other in others} == {tuple(sorted(order))}


@pytest.fixture
def labelled(tmp_path):
    """The folder of pseudo-labels of 5 of 9 toy images in two shards."""
    images = toy.write_unlabelled(tmp_path / "images", (4, 5))
    first = rows_with([[0, 2], [1, -1]], [[0.9, 0.6], [0.7, 0]])
    second = rows_with([[2, -1], [2, 0], [3, 1]], [[0.8, 0], [0.75, 0.55], [0.6, 0.55]])
    first["index"], second["index"] = [1, 3], [4, 6, 8]
    out = tmp_path / "pseudo"
    shards = [
        {"file": name, "sha256": pseudo_labels.write_rows(out / name, rows)}
        for name, rows in (("a.npy", first), ("b.npy", second))
    ]
    info = {"records": str(images), "split": "unlabelled", "soft": False, "shards": shards}
    info |= {"fingerprint": records.open_dataset(images).fingerprint}
    files.write_json(out / "pseudo.json", info | {"labels": toy.VOCABULARY.names})
    return out


def change(labelled, **changes):
    files.write_json(labelled / "pseudo.json", files.read_json(labelled / "pseudo.json") | changes)


def source(labelled, **options):
    return pseudo_labels.PseudoSource(
        labelled, **({"size": toy.SIZE, "names": toy.VOCABULARY.names} | options)
    )


HARD = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_a_source_yields_the_labelled_images(labelled):
    opened = source(labelled)
    assert len(opened) == 5
    np.testing.assert_array_equal([opened[k].labels for k in range(5)], HARD)
    for k, number in enumerate((1, 3, 4, 6, 8)):
        expected = toy.example("unlabelled", number, 7)
        assert opened[k].id == expected.id == f"unlabelled-{number}"
        np.testing.assert_array_equal(opened[k].image, expected.image)
        assert opened[k].labels.dtype == np.float32 and opened[k].label_mask.tolist() == [1] * 4
    assert opened.label_counts.tolist() == [2, 2, 3, 1]


def test_soft_labels_are_the_confidences(labelled):
    change(labelled, soft=True)
    opened = source(labelled)
    soft = [[0.9, 0, 0.6, 0], [0, 0.7, 0, 0], [0, 0, 0.8, 0], [0.55, 0, 0.75, 0], [0, 0.55, 0, 0.6]]
    np.testing.assert_array_equal([opened[k].labels for k in range(5)], np.float32(soft))
    np.testing.assert_allclose(opened.label_counts, np.sum(soft, axis=0), rtol=1e-6)


def test_balance_gives_every_label_the_same_number_of_images(labelled):
    opened = source(labelled, balance=4, seed=1)
    assert len(opened) == 16
    ids = [opened[k].id for k in range(16)]
    assert ids.count("unlabelled-8") == 4 + 2  # all of label 3, half of label 1
    labels = np.array([opened[k].labels for k in range(16)])
    assert opened.label_counts.tolist() == labels.sum(axis=0).tolist()
    assert opened.label_counts.min() >= 4
    again = source(labelled, balance=4, seed=1)
    assert [again[k].id for k in range(16)] == ids
    assert [source(labelled, balance=4, seed=2)[k].id for k in range(16)] != ids


def test_a_source_can_be_pickled(labelled):
    opened = pickle.loads(pickle.dumps(source(labelled, balance=2)))
    for k in range(len(opened)):
        np.testing.assert_array_equal(opened[k].image, source(labelled, balance=2)[k].image)


def test_the_fingerprint_covers_images_labels_and_softness(labelled, tmp_path):
    before = source(labelled).fingerprint
    assert source(labelled, balance=3).fingerprint == before
    change(labelled, teacher="elsewhere")
    assert source(labelled).fingerprint == before
    change(labelled, soft=True)
    soft = source(labelled).fingerprint
    rows = np.load(labelled / "a.npy")
    rows["labels"][0] = [3, -1]
    shards = files.read_json(labelled / "pseudo.json")["shards"]
    shards[0]["sha256"] = pseudo_labels.write_rows(labelled / "a.npy", rows)
    change(labelled, shards=shards)
    assert len({before, soft, source(labelled).fingerprint}) == 3


def test_invalid_input_is_rejected_in_one_line(labelled, tmp_path):
    def rejected(message, path=labelled, **options):
        with pytest.raises(InputError, match=message) as error:
            source(path, **options)
        assert "\n" not in str(error.value)

    rejected("nowhere.*pseudo.json", path=tmp_path / "nowhere")
    rejected("a.npy.*pseudo.json", path=labelled / "a.npy")
    rejected("labels", names=toy.VOCABULARY.names[::-1])
    rejected("32, but the student needs 64", size=64)
    toy.write_unlabelled(tmp_path / "images", (4, 5), seed=6)
    rejected(str(tmp_path / "images"))
    change(labelled, fingerprint=records.open_dataset(tmp_path / "images").fingerprint)
    (labelled / "b.npy").write_bytes((labelled / "a.npy").read_bytes())
    rejected(r"b\.npy")
    shards = files.read_json(labelled / "pseudo.json")["shards"][:1]
    shards[0]["sha256"] = pseudo_labels.write_rows(
        labelled / "a.npy", np.zeros(0, pseudo_labels.row_dtype(2))
    )
    change(labelled, shards=shards)
    rejected("--threshold")
