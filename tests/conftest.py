"""What all tests share: eight simulated CPU devices, and the real data where it exists."""

import os
import pathlib

# Before jax is imported: the sharding tests need eight devices on one machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import pytest  # noqa: E402

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real CT and label files; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"real CT not found at {SHARED}: see data/README.md")
    return SHARED
