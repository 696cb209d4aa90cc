"""Text generation: decoding with a key/value cache over tensor-parallel ranks, and prompt files."""
