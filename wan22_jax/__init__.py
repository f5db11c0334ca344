"""Wan2.2 TI2V-5B training and sampling in JAX."""

__version__ = "0.1.0"
