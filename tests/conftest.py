"""Fixtures shared by all tests."""

import beartype  # noqa: F401  # before nnsight, after which beartype 0.23 cannot be imported
import pytest

from helpers.tiny import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the three families in turn."""
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    """Let one warning of others through: transformers 5.17 gives a tensor of tile counts to `numpy.cumsum`."""
    config.addinivalue_line("filterwarnings", "ignore:__array_wrap__ must accept context:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reject test ids with a memory address: they differ between the processes of pytest-xdist, which then stops."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"Give these parameters ids without addresses: {', '.join(unstable[:3])}")
