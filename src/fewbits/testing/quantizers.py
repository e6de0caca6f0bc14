"""`check_quantizer`: whether a scheme keeps what `Quantizer` promises."""

from __future__ import annotations

import json

from fewbits.numerics.spec import Spec, spec_from_dict
from fewbits.quantizers.base import Quantizer
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect
from fewbits.testing.models import SmallModel
from fewbits.testing.quantizer_files import FILE_CHECKS
from fewbits.testing.quantizer_lifecycle import LIFECYCLE_CHECKS
from fewbits.testing.quantizer_numbers import NUMBER_CHECKS
from fewbits.testing.quantizer_setup import QuantizerSetup

_NAME = Contract("fewbits.Quantizer", "name: what the scheme is called in tables and messages")
_SPEC = Contract("fewbits.QuantSpec.to_dict", "A JSON-able description; `spec_from_dict` reads it.")


def check_quantizer(quantizer: Quantizer, *, max_examples: int = EXAMPLES) -> list[Check]:
    """The checks of a scheme.

    Every check works on a copy of `quantizer`, with its observers and its serializer, and a selector of the kit's own,
    for which no tensor is too small. If its observer needs data, only Linear layers are quantized.

    What is asked beyond the docstrings of `Quantizer`:

    - The same source gives the same bits, whatever the number of threads and the size of the blocks.
    - Weights are no larger than a sixteenth of what their dtype can hold. They decode to finite numbers.
    - A number is refused as out of range only if it is larger than a sixteenth of what the dtype of the scales, or of a
      cast, can hold.
    - A file is read without the class that made it.

    Args:
        quantizer: newly made.
        max_examples: how many examples a check that draws them looks at.

    Raises:
        ArgumentError: if it is no instance of `Quantizer`.
    """
    setup = QuantizerSetup(copy_of(quantizer, Quantizer, "check_quantizer"), max_examples)
    return checks(quantizer, (name_and_specs_are_sane, *LIFECYCLE_CHECKS, *NUMBER_CHECKS, *FILE_CHECKS), setup)


def name_and_specs_are_sane(setup: QuantizerSetup) -> None:
    """The scheme has a name, and specs that a file can describe."""
    quantizer = setup.make()
    expect(isinstance(quantizer.name, str) and quantizer.name != "", f"name is {quantizer.name!r}, not words", _NAME)
    quantizer.prepare(SmallModel())
    for spec in {quantizer.spec, *(row.spec for row in quantizer.ledger if row.spec is not None)}:
        expect(isinstance(spec, Spec), f"{spec!r} is neither a QuantSpec nor a CastSpec", _NAME)
        read = spec_from_dict(json.loads(json.dumps(spec.to_dict())))
        expect(read == spec, f"{spec!r} is read from a file as {read!r}", _SPEC)
