"""Structured events: through structlog where the application has configured it, else through `logging`.

The library never configures structlog. Unconfigured, structlog prints every event to standard output, which would
mix with the output of the program that embeds us; the standard logger "fewbits" stays silent below WARNING then.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal


def emit(level: Literal["info", "warning"], event: str, **fields: Any) -> None:
    """Emit one event with its fields."""
    import structlog  # at the first event: it would take as long to import as all of fewbits

    logger = structlog.get_logger("fewbits") if structlog.is_configured() else _standard_logger()
    getattr(logger, level)(event, **fields)


@functools.cache
def _standard_logger() -> Any:
    import structlog

    return structlog.wrap_logger(
        logging.getLogger("fewbits"),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"])],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
