"""Configuration of a run: schema, loading, and checks across settings."""
