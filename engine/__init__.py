"""Triaxis: a 3D-parallel training engine for 7B-class language models."""

__version__ = "0.1.0"
