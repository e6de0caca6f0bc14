"""Every order of calls, on models, mappings and files: an illegal call is refused and changes nothing."""

import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import save_file

from fewbits import QuantizedTensor, State
from fewbits.errors import ArgumentError, CalibrationError, StateError
from fewbits.quantizers.lifecycle import guard
from support.lifecycle_helpers import files_in, hook_count, mlp, named_tensors, small, snapshot

TOO_EARLY_OR_TOO_LATE = {
    "prepare": dict.fromkeys(["PREPARED", "OBSERVED", "CONVERTED", "VALIDATED"], "reset()"),
    "observe": {"CREATED": "prepare(model)", "CONVERTED": "reset()", "VALIDATED": "reset()"},
    "convert": {"CREATED": "prepare(model)", "CONVERTED": "reset()", "VALIDATED": "reset()"},
    "validate": {
        "CREATED": "prepare(model), then convert(),",
        "PREPARED": "convert()",
        "OBSERVED": "convert()",
    },
    "save": {
        "CREATED": "prepare(model), then convert(),",
        "PREPARED": "convert()",
        "OBSERVED": "convert()",
    },
}
# Random walks seldom reach late states, so each walk begins in a random state.
BEGINNINGS = [(), ("observe",), ("convert",), ("observe", "convert"), ("convert", "validate")]
KINDS = ["module", "module in place", "mapping", "mapping in place", "path"]


def stored_parts(value):
    return value.parts() if isinstance(value, QuantizedTensor) else {"": value}


class Lifecycle(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.batches = [torch.ones(2, 16)]
        self.quantizer = small()
        self.state, self.kind = "CREATED", None
        self.source = self.prepared = self.result = None
        self.untouched = {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @property
    def inplace(self):
        return "in place" in (self.kind or "")

    def source_of(self, kind):
        if "module" in kind:
            return mlp()
        if "mapping" in kind:
            return dict(mlp().state_dict())
        path = self.folder / "source.safetensors"
        if not path.exists():  # written only once: a file that changes after `prepare` is refused
            save_file(mlp().state_dict(), path)
        return path

    def bits_of(self, thing):
        if thing is None:
            return None
        if isinstance(thing, Path):
            return thing.read_bytes()
        if isinstance(thing, dict):
            parts = {(name, part): t for name, value in thing.items() for part, t in stored_parts(value).items()}
            return snapshot(parts)
        return snapshot(named_tensors(thing)), [m.training for m in thing.modules()], hook_count(thing)

    def everything(self):
        return (
            self.quantizer.state.name,
            self._value_of("ledger"),
            self._value_of("report"),
            [self.bits_of(thing) for thing in (self.source, self.prepared, self.result)],
            files_in(self.folder),
        )

    def _value_of(self, name):
        try:
            return getattr(self.quantizer, name)
        except StateError as error:
            return str(error)

    def attempt(self, call, *args, **kwargs):
        """Make a call; if it is illegal, check how it is refused and return False."""
        missing = TOO_EARLY_OR_TOO_LATE[call].get(self.state)
        if missing is None:
            self.returned = getattr(self.quantizer, call)(*args, **kwargs)
            return True
        before = self.everything()
        message = f"{call}() is not legal in state {self.state}; call {missing} first"
        with pytest.raises(StateError, match=rf"^{re.escape(message)}$"):
            getattr(self.quantizer, call)(*args, **kwargs)
        assert self.everything() == before
        return False

    @initialize(kind=st.sampled_from([None, *KINDS]), calls=st.sampled_from(BEGINNINGS))
    def begin(self, kind, calls):
        if kind is not None:
            self.prepare(kind=kind)
            for call in calls:
                getattr(self, call)()

    @rule(kind=st.sampled_from(KINDS))
    def prepare(self, kind):
        source = self.source_of(kind)
        if self.attempt("prepare", source, inplace="in place" in kind):
            self.kind, self.source, self.prepared, self.state = kind, source, self.returned, "PREPARED"
            self.untouched = self.bits_of(source)

    @rule()
    def observe(self):
        if self.kind in ("mapping", "mapping in place", "path") and self.state in ("PREPARED", "OBSERVED"):
            with pytest.raises(CalibrationError, match="no forward"):
                self.quantizer.observe(self.batches)
        elif self.attempt("observe", self.batches):
            self.state = "OBSERVED"

    @rule()
    def convert(self):
        output = self.folder / "output.safetensors" if self.kind == "path" else None
        if self.attempt("convert", output=output):
            self.result, self.state = self.returned, "CONVERTED"
            if self.inplace:
                assert self.result is self.source

    @precondition(lambda self: self.state in ("PREPARED", "OBSERVED"))
    @rule()
    def convert_with_output_in_the_wrong_place(self):
        before = self.everything()
        with pytest.raises(ArgumentError, match="output="):
            self.quantizer.convert(output=None if self.kind == "path" else self.folder / "output.safetensors")
        assert self.everything() == before

    @precondition(lambda self: self.state in ("CONVERTED", "VALIDATED"))
    @rule()
    def validate_with_an_unknown_reaction(self):
        before = self.everything()
        with pytest.raises(ArgumentError, match="on_failure"):
            self.quantizer.validate(on_failure="explode")
        assert self.everything() == before

    @rule()
    def validate(self):
        if self.attempt("validate"):
            assert self.returned.ok
            assert self.quantizer.report is self.returned
            self.state = "VALIDATED"

    @rule()
    def save(self):
        path = self.folder / "saved.safetensors"
        if self.attempt("save", path):
            assert path.is_file()

    @precondition(lambda self: self.state in ("CONVERTED", "VALIDATED"))
    @rule()
    def save_to_a_place_that_cannot_be_written(self):
        before = self.everything()
        with pytest.raises((ArgumentError, OSError)):
            self.quantizer.save(self.folder / "no such folder" / "saved.safetensors")
        assert self.everything() == before

    @rule()
    def reset(self):
        self.quantizer.reset()
        if isinstance(self.prepared, torch.nn.Module):
            assert hook_count(self.prepared) == 0
        self.state, self.kind = "CREATED", None
        self.source = self.prepared = self.result = None

    @invariant()
    def the_quantizer_is_in_the_state_that_was_expected(self):
        assert self.quantizer.state.name == self.state

    @invariant()
    def the_source_is_untouched(self):
        if self.source is not None and not (self.inplace and self.result is not None):
            assert self.bits_of(self.source) == self.untouched

    @invariant()
    def no_temporary_file_is_left(self):
        known = {"source.safetensors", "output.safetensors", "saved.safetensors"}
        assert set(files_in(self.folder)) <= known


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(stateful_step_count=20)


@pytest.mark.parametrize(
    ("call", "state", "missing"),
    [(call, state, missing) for call, table in TOO_EARLY_OR_TOO_LATE.items() for state, missing in table.items()],
)
def test_the_guard_names_state_call_and_missing_call(call, state, missing):
    with pytest.raises(StateError, match=re.escape(f"{call}() is not legal in state {state}; call {missing} first")):
        guard(State[state], call)


@pytest.mark.parametrize("call", ["prepare", "observe", "convert", "validate", "save", "reset"])
def test_the_guard_lets_everything_else_pass(call):
    for state in State:
        if state.name not in TOO_EARLY_OR_TOO_LATE.get(call, {}):
            guard(state, call)
