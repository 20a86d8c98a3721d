"""Training: optimizer, step, loop, checkpoints, diagnostics, histories and loggers."""
