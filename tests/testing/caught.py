"""How the tests of broken strategies ask the kit."""

import pytest

from fewbits.testing import ConformanceError


def caught(checks, name, match):
    """The named check fails, says what matches, and cites a promise or names the error that was raised."""
    check = {str(check): check for check in checks}[name]
    with pytest.raises(ConformanceError, match=match) as found:
        check()
    assert found.value.__cause__ is not None or "\n    fewbits." in str(found.value)


def covered(checks, cases):
    """Every check is seen to fail in one of the cases."""
    assert {str(check) for check in checks} == {case.values[1] for case in cases}
