"""Test support: ranks that start in a fraction of a second, small models, runs, and the parity campaign."""
