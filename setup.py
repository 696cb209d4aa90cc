"""Kept for `pip install` and `python setup.py`; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
