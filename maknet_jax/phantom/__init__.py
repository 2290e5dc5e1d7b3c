"""A generated CT data set in the formats of real ones, for the demo and the tests."""

from maknet_jax.phantom.volumes import deeplesion_files, open_phantom, write_phantom

__all__ = ["deeplesion_files", "open_phantom", "write_phantom"]
