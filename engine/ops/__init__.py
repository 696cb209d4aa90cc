"""Fused operators, one file each: a reference in plain PyTorch, a fast path, and the rule that chooses."""
