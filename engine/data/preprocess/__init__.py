"""Documents and records to token datasets."""
