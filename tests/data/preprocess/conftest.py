"""Suffixes of compressions."""

import pytest


@pytest.fixture(params=["", ".gz", ".zst", ".bz2", ".xz"])
def suffix(request):
    return request.param
