"""Token datasets on disk."""
