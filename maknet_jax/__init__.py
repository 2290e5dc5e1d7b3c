"""MAKNet in JAX: pre-train, label and explain CT networks on accelerators."""

__version__ = "0.1.0"
