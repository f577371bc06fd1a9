"""Fixtures shared by all tests."""

import pytest
from tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the three families in turn."""
    return request.param
