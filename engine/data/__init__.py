"""Token datasets on disk, which tokens are sample i, and the loader that reads ahead."""
