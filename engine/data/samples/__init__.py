"""Samples, each a pure function of its number, and the prefetching batch loader."""
