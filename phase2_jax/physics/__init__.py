"""The physics of the model as pure functions on arrays."""
