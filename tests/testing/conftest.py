"""Checks that fail on purpose need not be reduced to the simplest example."""

import pytest
from hypothesis import Phase, settings


@pytest.fixture
def first_failure():
    """Inside, Hypothesis stops at the first example that fails, and remembers none."""
    settings.register_profile("as before", settings.default)
    settings.register_profile("first failure", settings.default, phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("first failure")
    yield
    settings.load_profile("as before")
