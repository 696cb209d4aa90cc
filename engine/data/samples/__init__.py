"""Samples as pure functions of their number, and the loader that prefetches batches."""
