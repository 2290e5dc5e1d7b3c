"""Descriptions of NVIDIA GPUs for XLA's compiler, as JAX's CUDA plugin contains them."""

import importlib.util
import mmap
import pathlib

from maknet_jax.errors import InputError, installing

PLUGIN = "jax_plugins.xla_cuda13"
NAMES = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
    "b200": "NVIDIA B200",
}


def target_config(name: str) -> str:
    """The description of a GPU, a text of XLA's GpuTargetConfigProto.

    Args:
      name: a key of `NAMES`.

    Raises:
      InputError: the plugin is not installed, or this version does not describe the GPU.
    """
    spec = importlib.util.find_spec(PLUGIN)
    library = pathlib.Path(str(spec and spec.origin)).with_name("xla_cuda_plugin.so")
    if not library.is_file():
        raise InputError(f"{PLUGIN} is not installed: {installing('cuda')}")
    mark = f'device_description_str: "{NAMES[name]}"\n'.encode()
    # The descriptions are C strings of the shared library: from one zero byte to the next.
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        place = content.find(mark)
        if place < 0:
            raise InputError(f"{library.name} does not describe {NAMES[name]}: choose another GPU")
        start, end = content.rfind(b"\0", 0, place) + 1, content.find(b"\0", place)
        return content[start:end].decode()
