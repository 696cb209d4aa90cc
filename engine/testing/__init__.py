"""Test support: ranks that start in a fraction of a second, recorded ranks and proofs, small models, and parity."""
