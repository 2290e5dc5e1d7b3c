"""Slices of the phantom: CT-like HU, the couch, orientation and the order of body parts."""

import dataclasses

import numpy as np
import pytest

from maknet_jax.phantom import anatomy, drawing, reference
from maknet_jax.phantom import labels as phantom_labels


def mean_column(mask):
    return np.nonzero(mask)[1].mean()


@pytest.fixture(scope="module")
def torsos():
    """Slices of a few patients from the neck to the thighs: (anatomy, scan, z, hu, organs)."""
    drawn = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        body = anatomy.make_patient(rng)
        scan = dataclasses.replace(
            anatomy.make_scan(rng, body), fov=480.0, centre=(0.0, 0.0), rotation=0.0, padding=None
        )
        for z in np.linspace(0.01, 0.99, 50):
            drawn.append((body, scan, z, *drawing.draw_slice(body, scan, z, 96, rng)))
    return drawn


def test_a_lesion_changes_only_its_surroundings():
    lesion = anatomy.Lesion(300.0, 40.0, 60.0, 6.0, 0.7, 0.4, 12.0, 400.0, "smooth")
    body = anatomy.make_patient(np.random.default_rng(3))
    scan = anatomy.make_scan(np.random.default_rng(3), body)
    z = 300.0 / (reference.LENGTH * body.height)

    def drawn(at, lesions):
        noise = np.random.default_rng(0)
        return drawing.draw_slice(body, scan, at, 128, noise, lesions)[0].astype(int)

    changed = np.argwhere(np.abs(drawn(z, [lesion]) - drawn(z, [])) > 150)
    assert len(changed) > 40
    assert (np.hypot(*(changed - (40, 60)).T) < 8).all()
    assert np.array_equal(drawn(1.1 * z, [lesion]), drawn(1.1 * z, []))


def test_hu_of_organs(torsos):
    expected = {
        "background": (-1010, -985),
        "right lung": (-900, -680),
        "left lung": (-900, -680),
        "liver": (20, 160),
        "spleen": (20, 180),
        "cardiac": (10, 220),
        "urinary bladder": (-10, 50),
        "pelvic bone": (180, 700),
        "rib": (120, 600),
        "thigh": (-100, 80),
        "trachea": (-1000, -500),
        "right kidney": (-20, 240),
        "left kidney": (-20, 240),
        "lumbar": (90, 600),
    }
    values = {name: [] for name in expected}
    for _, _, _, hu, organs in torsos:
        for name in expected:
            values[name].append(hu[organs == reference.VALUE[name]])
    for name, (low, high) in expected.items():
        hu = np.concatenate(values[name])
        assert hu.size and low < hu.mean() < high, (name, hu.mean())
        assert hu.std() > 5  # noise


def test_the_body_lies_on_the_table(torsos):
    for body, scan, z, hu, organs in torsos:
        table = organs == reference.VALUE["table"]
        shape = (organs != 0) & ~table
        assert shape.sum() * 25 > 8000, z  # mm2
        assert hu[table].max() > -700 and np.median(hu[table]) < -600  # shell and foam
        column = round(mean_column(shape))
        back = (reference.BACK + scan.table.gap) * body.depth / 5 + 47.5  # 5 mm per pixel
        assert abs(np.nonzero(table[:, column])[0].min() - back) < 5
        bare = dataclasses.replace(scan, table=anatomy.Table(0.0, 1e-3, 0.0, 0.0))
        _, alone = drawing.draw_slice(body, bare, z, 96, np.random.default_rng(0))
        assert np.array_equal(shape, alone != 0)  # the table never covers the body


def test_columns_run_from_the_patients_right_to_left(torsos):
    def mean_of(name):
        masks = [organs == reference.VALUE[name] for *_, organs in torsos]
        return np.mean([mean_column(mask) for mask in masks if mask.sum() > 20])

    assert mean_of("right lung") < 45 < 51 < mean_of("left lung")
    assert mean_of("right kidney") < 45 < 51 < mean_of("left kidney")
    assert mean_of("liver") < 45 < 51 < mean_of("spleen")


def test_body_parts_are_in_order_and_exclusive_ones_never_together(torsos):
    seen = {}
    for body, scan, z, _, organs in torsos:
        terms = phantom_labels.visible_terms(organs, (scan.fov / 96) ** 2)
        assert not body.absent & terms
        for a, b in phantom_labels.EXCLUSIVE:
            assert not {a, b} <= terms, (z, a, b)
        for term in terms:
            seen.setdefault(term, []).append(z)
    assert set(seen) == {
        name for name, term in phantom_labels.ONTOLOGY.items() if term.label_class == "bodypart"
    } & set(phantom_labels.TERMS)
    order = ("neck", "chest", "abdomen", "pelvis", "thigh")
    means = [np.mean(seen[term]) for term in order]
    assert means == sorted(means)
