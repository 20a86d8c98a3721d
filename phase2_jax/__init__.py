"""Breath of Life in JAX: a linear-time language model whose memory forgets by physics."""

__version__ = "0.1.0"
