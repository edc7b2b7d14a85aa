"""Unit tests wait for the children they start themselves."""

import pytest


@pytest.fixture(autouse=True)
def no_stealing(no_reaper: None) -> None:
    """Keep the reaper of the integration tests from collecting them first."""
