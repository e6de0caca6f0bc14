"""The states of a quantizer, the table of legal calls, and what a quantizer knows in each state."""

from __future__ import annotations

import enum

from fewbits._events import emit
from fewbits.conversion.file_job import FileJob
from fewbits.conversion.file_writer import Share
from fewbits.conversion.job import Job
from fewbits.conversion.planned_tuning import PlannedTuning
from fewbits.errors import ArgumentError, StateError
from fewbits.quantizers.scheme import Scheme
from fewbits.selection.ledger import Ledger
from fewbits.validation.evaluation import Evaluation
from fewbits.validation.report import Report


class State(enum.Enum):
    """The states of the lifecycle."""

    CREATED = "created"
    PREPARED = "prepared"
    OBSERVED = "observed"
    CONVERTED = "converted"
    VALIDATED = "validated"


_C, _P, _O, _D, _V = State

#: call -> (states in which it is legal, next state; None for no change).
TRANSITIONS: dict[str, tuple[frozenset[State], State | None]] = {
    "prepare": (frozenset({_C}), _P),
    "observe": (frozenset({_P, _O}), _O),
    "convert": (frozenset({_P, _O}), _D),
    "validate": (frozenset({_D, _V}), _V),
    "save": (frozenset({_D, _V}), None),
    "reset": (frozenset(State), _C),
}


def guard(state: State, call: str) -> None:
    """Refuse a call that is illegal in a state.

    Raises:
        StateError: naming the state, the call, and the call that is missing.

    >>> guard(State.CREATED, "convert")
    Traceback (most recent call last):
        ...
    fewbits.errors.StateError: convert() is not legal in state CREATED; call prepare(model) first
    """
    allowed, _ = TRANSITIONS[call]
    if state in allowed:
        return
    if state is State.CREATED:
        missing = "prepare(model)" if call in ("observe", "convert") else "prepare(model), then convert(),"
    else:
        missing = "convert()" if call in ("validate", "save") else "reset()"
    raise StateError(f"{call}() is not legal in state {state.name}; call {missing} first")


def plan_for_file(quantizer: Lifecycle, tuning: PlannedTuning | None, evaluation: Evaluation | None) -> None:
    """Let a quantizer whose source is a file tune and compare the result before it writes the files.

    Args:
        quantizer: a prepared quantizer.
        tuning: how to tune the scales; None leaves them as they are.
        evaluation: how to compare the result with the model; None does not compare.

    Raises:
        ArgumentError: if the source is no file with a model, or `tuning` asks for more than scales.
        MismatchError: naming the converted tensors that are not exactly one parameter of the model.
    """
    quantizer._guarded_file_job().plan(tuning, evaluation)


class Lifecycle(Scheme):
    """A scheme with a state, and with a source on its way to a result."""

    _state = State.CREATED
    _job: Job | None = None

    @property
    def state(self) -> State:
        """The state of the lifecycle."""
        return self._state

    @property
    def ledger(self) -> Ledger:
        """The fate of every tensor.

        Raises:
            StateError: before `prepare`.
        """
        if self._job is None:
            raise StateError(f"there is no ledger in state {self._state.name}; call prepare(model) first")
        return self._job.ledger

    @property
    def report(self) -> Report:
        """The report of the last validation.

        Raises:
            StateError: before `validate`.
        """
        if self._job is None or self._job.report is None:
            raise StateError(f"there is no report in state {self._state.name}; call validate() first")
        return self._job.report

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Files of a source directory that are neither converted nor copied to the result."""
        return tuple(self._job.left_behind) if isinstance(self._job, FileJob) else ()

    @property
    def opens_in(self) -> str | None:
        """Who can open the result, and why others cannot; None unless the source is a transformers directory."""
        readers = self._job.readers if isinstance(self._job, FileJob) else None
        return None if readers is None else str(readers)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The work of each process on the result; empty for a result in memory."""
        return self._job.shares if isinstance(self._job, FileJob) else ()

    def _guarded(self, call: str) -> Job:
        """The job, if the call is legal now."""
        guard(self._state, call)
        if self._job is None:
            raise StateError(f"{call}() needs a source; call reset(), then prepare(model)")
        return self._job

    def _guarded_file_job(self) -> FileJob:
        """The job of a path that is prepared, and not yet converted."""
        job = self._guarded("convert")
        if not isinstance(job, FileJob):
            raise ArgumentError("only the conversion of a path can be shared; prepare a path, or call convert()")
        return job

    def _advance(self, call: str, **fields: object) -> None:
        self._state = TRANSITIONS[call][1] or self._state
        emit("info", call, scheme=self.name, state=self._state.name, **fields)
