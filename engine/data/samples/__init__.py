"""Which tokens are sample i, and the loader that reads ahead."""
