"""What the input pipeline hands to a step."""

import numpy as np

Batch = dict[str, np.ndarray]
"""tokens (B, N) int32; labels (B, N) int32, -1 where nothing is scored; reset (B, N) bool, True wipes the memory before
that token."""

NOT_SCORED = -1
