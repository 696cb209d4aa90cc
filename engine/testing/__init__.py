"""Machinery for tests: real ranks in a fraction of a second."""
