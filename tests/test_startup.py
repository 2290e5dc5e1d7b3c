"""The benchmark of start-up times: its inputs."""

import pytest

from benchmarks.speed import startup, verb_starts
from maknet_jax.ct import search
from maknet_jax.errors import InputError


def test_startup_rejects_an_unknown_config():
    with pytest.raises(InputError, match="'nowhere'"):
        startup.main(["--quick", "--config", "nowhere"])


def test_repeated_slices_are_one_series(shared_data, tmp_path):
    source = shared_data / "dicom" / "liver_j2k_20"
    verb_starts.repeat_series(source, tmp_path / "long", 25, native=False)
    (ref,), failures = search.find_series(tmp_path / "long")
    assert (ref.count, failures) == (25, [])
