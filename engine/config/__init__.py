"""Every setting of a run: the schema, loading, and checks across settings."""
