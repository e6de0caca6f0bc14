"""The conformance kit: checks that a strategy of your own keeps the promises of its interface.

::

    @pytest.mark.parametrize("check", check_quantizer(MyScheme()), ids=str)
    def test_it_conforms(check):
        check()

Each of `check_quantizer`, `check_observer`, `check_rounding`, `check_selector`, `check_serializer`, `check_kernel` and
`check_module` returns a list of named checks, each called without arguments. The Hypothesis strategies that they draw
from are here too, for tests of your own. This package needs Hypothesis: ``pip install 'fewbits[testing]'``.
"""

try:
    from fewbits.testing.check import Check, ConformanceError
    from fewbits.testing.kernels import check_kernel
    from fewbits.testing.models import SmallModel, models
    from fewbits.testing.modules import check_module
    from fewbits.testing.observers import check_observer
    from fewbits.testing.quantizers import check_quantizer
    from fewbits.testing.rounding import check_rounding
    from fewbits.testing.selectors import check_selector
    from fewbits.testing.serializers import check_serializer
    from fewbits.testing.strategies import layouts, levels, numbers, problems, shapes, specs, tensors, weights
except ModuleNotFoundError as missing:
    if missing.name != "hypothesis":
        raise
    raise ModuleNotFoundError(
        "fewbits.testing needs hypothesis: pip install 'fewbits[testing]'", name="hypothesis"
    ) from missing

__all__ = [
    "Check",
    "ConformanceError",
    "SmallModel",
    "check_kernel",
    "check_module",
    "check_observer",
    "check_quantizer",
    "check_rounding",
    "check_selector",
    "check_serializer",
    "layouts",
    "levels",
    "models",
    "numbers",
    "problems",
    "shapes",
    "specs",
    "tensors",
    "weights",
]
