"""Structured events: through structlog where the application has configured it, else through `logging`.

The library never configures structlog. Unconfigured, structlog prints every event to standard output, which would
mix with the output of the program that embeds us; the standard logger "fewbits" stays silent below WARNING then.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import structlog

_standard = structlog.wrap_logger(
    logging.getLogger("fewbits"),
    processors=[structlog.processors.KeyValueRenderer(key_order=["event"])],
    wrapper_class=structlog.stdlib.BoundLogger,
)


def emit(level: Literal["info", "warning"], event: str, **fields: Any) -> None:
    """Emit one event with its fields."""
    logger = structlog.get_logger("fewbits") if structlog.is_configured() else _standard
    getattr(logger, level)(event, **fields)
