"""The states of a quantizer, and the table of legal calls."""

from __future__ import annotations

import enum

from fewbits.errors import StateError


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

#: The call that is missing before a call that is too early.
_MISSING = {"observe": "prepare(model)", "convert": "prepare(model)", "validate": "convert()", "save": "convert()"}
_ORDER = list(State)


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
    too_early = all(_ORDER.index(state) < _ORDER.index(other) for other in allowed)
    missing = _MISSING[call] if too_early else "reset()"
    if too_early and missing == "convert()" and state is State.CREATED:
        missing = "prepare(model), then convert(),"
    raise StateError(f"{call}() is not legal in state {state.name}; call {missing} first")


def after(state: State, call: str) -> State:
    """The state that a successful call leads to."""
    return TRANSITIONS[call][1] or state
