"""Fused operators, one file each: a PyTorch reference, a fast path, and the rule that selects between them."""
