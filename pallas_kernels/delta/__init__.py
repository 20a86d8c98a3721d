"""Error-correcting memory: the Hebbian memory that writes what its readout of the key still lacks (the delta rule)."""
