"""Shared by all tests: eight simulated CPU devices, and the real data if it exists."""

import os
import shutil
import tempfile
import urllib.request

# Before jax is imported. Programs are compiled once for all test modules, processes and commands.
CACHE = tempfile.mkdtemp(prefix="maknet-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The sharding tests need eight devices on one machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import pytest  # noqa: E402

from benchmarks.real_data import DATA  # noqa: E402
from maknet_jax.data import object_store  # noqa: E402


def pytest_unconfigure():
    """Removes the compiled programs."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Commands do not use the cache of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Keeps below the kernel's limit of memory mappings in a process (65,530): XLA crashes there.

    A compiled step of a network holds thousands, and without this all modules add up.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real CT and label files; tests that need it are skipped without it."""
    if not DATA.is_dir():
        pytest.skip(f"real CT not found at {DATA} (set MAKNET_SHARED): see data/README.md")
    return DATA


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A small phantom: the paths that `write_phantom` returns."""
    from maknet_jax.phantom import write_phantom

    return write_phantom(
        tmp_path_factory.mktemp("phantom") / "phantom",
        patients=12,
        unlabelled_volumes=2,
        size=64,
        slices=12,
    )


@pytest.fixture(scope="session")
def shards(phantom, tmp_path_factory):
    """The phantom's labelled slices as a prepared data set at 32 x 32."""
    from maknet_jax import prepare
    from maknet_jax.data import records
    from maknet_jax.phantom import deeplesion_files

    out = tmp_path_factory.mktemp("shards") / "phantom"
    prepare.prepare_deeplesion(out=out, size=32, **deeplesion_files(phantom))
    return records.open_dataset(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy data set; modules that need another one define their own."""
    import toy

    return toy.write(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """The workdir of a tiny MAKNet after a few dozen steps; tests must not change its weights."""
    from maknet_jax import train
    from maknet_jax.runs import config

    folder = tmp_path_factory.mktemp("runs") / "trained"
    page = config.load(
        "smoke",
        [
            f"data.path={shards.path}",
            "data.size=32",
            "data.batch_size=16",
            "epochs=8",
            "evaluate_every=4",
            "model.options.stem=8",
            "model.options.blocks=1,1",
            "model.options.growth_rates=16,16",
            "model.options.widths=16,16",
        ],
    )
    train.train(page, folder)
    return folder


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """The bundle of `trained`, with its zip beside it; tests must not change it."""
    import maknet_jax

    out = tmp_path_factory.mktemp("bundles") / "torso"
    maknet_jax.export(trained, out, zipped=True)
    return out


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The local cache; fsspec's file system in memory stands for an object store."""
    monkeypatch.setenv("MAKNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "SCHEMES", ("s3", "gs", "memory"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server on this machine with one bucket; yields its file system."""
    fsspec = pytest.importorskip("fsspec")
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key"}
    settings |= {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    store = fsspec.filesystem("s3")
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # all servers of a process share their buckets
    store.mkdir("bucket")
    yield store
    store.clear_instance_cache()
    server.stop()
