"""The phantom's patients: how often they lack an organ."""

import numpy as np

from maknet_jax.phantom import anatomy


def test_organs_are_absent_at_the_requested_rate():
    def drawn(absent):
        bodies = [anatomy.make_patient(np.random.default_rng(n), absent) for n in range(100)]
        return [len(body.absent) for body in bodies], bodies

    some, bodies = drawn(None)
    assert 0.5 < np.mean(some) < 2
    half, _ = drawn(0.5)
    assert 2.5 < np.mean(half) < 3.5  # of seven; a second lung or kidney is never absent
    assert set(drawn(1.0)[0]) == {5}
    none, whole = drawn(0.0)
    assert set(none) == {0}
    assert whole[0].arms == bodies[0].arms  # the rest of the patient is unchanged
