"""Flax NNX modules of the language model: thin wrappers around the pure functions of `memory` and `physics`."""
