"""The architecture: one decoder, driven by its configuration."""
