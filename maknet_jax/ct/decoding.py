"""Decodes compressed DICOM pixels. GDCM, which can abort its process, runs in a child process."""

import atexit
import contextlib
import functools
import os
import subprocess
import tempfile
import threading
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder

from maknet_jax.ct import children
from maknet_jax.ct.reading import one_line, quiet
from maknet_jax.errors import Rejected

TIME_LIMIT = 60.0  # seconds per slice in the child process; a large slice takes one

_IMAGE = {
    "rows": "Rows",
    "columns": "Columns",
    "samples_per_pixel": "SamplesPerPixel",
    "photometric_interpretation": "PhotometricInterpretation",
    "bits_allocated": "BitsAllocated",
    "bits_stored": "BitsStored",
    "pixel_representation": "PixelRepresentation",
}
_START = "import sys; from maknet_jax.ct import decoding; decoding.serve(int(sys.argv[1]))"


def decode(data: pydicom.Dataset, syntax: str, plugin: str) -> np.ndarray:
    """The stored values of an image with one frame.

    Args:
      data: the elements of the image, PixelData included.
      syntax: the UID of its transfer syntax.
      plugin: the pydicom plugin that decodes it; `gdcm` runs in a child process.

    Raises:
      Rejected: the image is damaged. Other exceptions of the decoder are raised as they are, unless
        it runs in a child process.
    """
    # As a dict, because pydicom annotates the options without `Unpack`.
    options: dict[str, Any] = {"number_of_frames": 1, "pixel_keyword": "PixelData"}
    options["correct_unused_bits"] = False
    options |= {name: data[key].value for name, key in _IMAGE.items()}
    call = str(syntax), plugin, data.PixelData, options
    return _child().decode(call) if plugin == "gdcm" else _decode(*call)


def _decode(syntax: str, plugin: str, pixels: bytes, options: dict[str, Any]) -> np.ndarray:
    decoder = get_decoder(pydicom.uid.UID(syntax))
    values, _ = decoder.as_array(pixels, decoding_plugin=plugin, **options)
    return values


@functools.cache
def _child() -> "_Child":
    return _Child()


class _Child:
    """The child process. It starts with the first image, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: children.Connection | None = None
        atexit.register(self._stop)

    def decode(self, call: tuple[Any, ...]) -> np.ndarray:
        """Decodes one image; one thread at a time."""
        with self._lock:
            try:
                values, problem = self._answer(call)
            except EOFError:
                self._stop()
                raise Rejected("broken pixel data: the decoder aborted") from None
            except BaseException:  # the answer to this call must not be taken for the next one's
                self._stop()
                raise
        if problem:
            raise Rejected(problem)
        return values

    def _answer(self, call: tuple[Any, ...]) -> tuple[np.ndarray, str]:
        """(values, problem); raises EOFError if the process died."""
        if self._pipe is None:
            self._pipe = self._start()
        try:
            self._pipe.send(call)
            if not self._pipe.poll(TIME_LIMIT):
                raise Rejected(f"broken pixel data: not decoded within {TIME_LIMIT:g} seconds")
            return self._pipe.recv()
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None

    def _start(self) -> children.Connection:
        null = subprocess.DEVNULL
        self._process, ours = children.start(_START, stdin=null, stdout=null, stderr=null)
        pipe = children.connection(ours)
        try:
            pipe.recv()
        except (EOFError, ConnectionResetError):
            pipe.close()
            code = self._process.wait()
            raise RuntimeError(f"the JPEG decoder does not start: exit code {code}") from None
        return pipe

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            self._process.kill()
            self._process.wait()


def serve(descriptor: int) -> None:
    """Decodes images until the parent closes the pipe: the main function of the child process.

    On damaged data libjpeg writes "Corrupt JPEG data" to stderr, fills in the rest of the image and
    reports success, so this line is the only sign of damage.
    """
    children.ignore_stop_signals()
    pipe = children.Connection(descriptor)
    with contextlib.suppress(EOFError, OSError), tempfile.TemporaryFile() as printed, quiet():
        os.dup2(printed.fileno(), 2)
        pipe.send("ready")
        while True:
            call = pipe.recv()
            values, problem = None, ""
            try:
                values = _decode(*call)
            except Exception as error:
                problem = f"broken DICOM pixel data ({one_line(error)})"
            printed.seek(0)
            lines = [line for line in printed.read().splitlines() if b"JPEG" in line]
            printed.seek(0)
            printed.truncate()
            if lines and not problem:
                problem = f"broken pixel data: {lines[0].decode(errors='replace').strip()}"
            pipe.send((values, problem))
