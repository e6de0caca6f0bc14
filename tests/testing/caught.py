"""Assertions for the tests of broken strategies."""

import pytest

from fewbits.testing import ConformanceError


def caught(checks, name, match):
    """Assert that the named check fails with this message, and cites a promise or chains the original error."""
    check = {str(check): check for check in checks}[name]
    with pytest.raises(ConformanceError, match=match) as found:
        check()
    assert found.value.__cause__ is not None or "\n    fewbits." in str(found.value)


def covered(checks, cases):
    """Assert that each check fails in one of the cases."""
    assert {str(check) for check in checks} == {case.values[1] for case in cases}
