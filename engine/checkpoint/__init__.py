"""Checkpoints: named tensors cut into rectangles, committed atomically, read back by any layout."""
