"""MAKNet in JAX: pre-train, label and explain CT networks on accelerators.

    import maknet_jax

    model = maknet_jax.load("runs/teacher")  # a workdir, a bundle or a released model
    print(model.predict("scans/series"))

Importing the package does not import JAX; submodules are imported on first use. A verb is a module
that can be called like its function: `maknet_jax.train(config, workdir)` is
`maknet_jax.train.train(config, workdir)`. Type checkers do not see that the module is callable; for
them, write `from maknet_jax.train import train`.
"""

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect

__version__ = "0.1.0"

_API = ("Model", "load")  # of `maknet_jax.api`
_COMMAND = ("cli", "console", "errors", "files")  # import no JAX; the command sets the level itself


def __getattr__(name: str) -> Any:
    """Imports a name of the API, a verb or a subpackage on first use."""
    if not name.startswith("_") and name not in _COMMAND and "jax" not in sys.modules:
        # JAX is imported soon. Its C++ logs "Very slow compile?" as an error: level 3 hides it.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if name in _API:
        return getattr(importlib.import_module(f"{__name__}.api"), name)
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":  # an import of that module failed
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also names what is imported on first use, for completion in a shell or notebook."""
    return sorted({*globals(), *_API})


class _Verb(types.ModuleType):
    """A module that can be called like the function that has its name."""

    def _function(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function()(*args, **options)

    @property
    def __signature__(self) -> "inspect.Signature":
        import inspect  # slow to import, and needed only by editors and `help`

        return inspect.signature(self._function())


class _Package(types.ModuleType):
    """Makes verbs callable when the import system sets them as attributes of this package."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is types.ModuleType and callable(vars(value).get(name)):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
