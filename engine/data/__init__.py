"""The data of a run: from text to token datasets on disk, and from these to batches."""
