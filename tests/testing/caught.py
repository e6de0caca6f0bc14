"""Assertions for the tests of broken strategies."""

import pytest

from fewbits.testing import ConformanceError


def caught(checks, name, match):
    """Assert that the named check fails with this message, which names the check and its promise."""
    check = {str(check): check for check in checks}[name]
    with pytest.raises(ConformanceError, match=match) as found:
        check()
    assert str(found.value).startswith(f"{check.subject}, {name}: ")
    assert str(found.value).endswith(f"\n    Promise: {check.promise}")


def covered(checks, cases):
    """Assert that each check fails in one of the cases."""
    assert {str(check) for check in checks} == {case.values[1] for case in cases}
