"""Preprocessing: documents and conversations to token datasets."""
