"""Checkpoints: named tensors stored as rectangles, committed atomically, loadable by any layout."""
