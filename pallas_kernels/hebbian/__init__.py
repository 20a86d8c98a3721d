"""Dissipative Hebbian memory: decay, write, read."""
