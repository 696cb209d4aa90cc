"""Suffixes of compressions."""

import pytest


@pytest.fixture(params=["", ".gz", ".zst"])
def suffix(request):
    return request.param
