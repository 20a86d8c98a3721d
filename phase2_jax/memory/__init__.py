"""Dissipative Hebbian fast weights: pure functions on an explicit `MemoryState`."""
