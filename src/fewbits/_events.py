"""Emit structured events through structlog if the application has configured it, else through `logging`.

The library never configures structlog. Unconfigured, structlog would print every event to standard output, into the
output of the application. The standard logger "fewbits" is silent below WARNING by default.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal


def emit(level: Literal["info", "warning"], event: str, **fields: Any) -> None:
    """Emit one event with its fields."""
    import structlog  # imported at the first event, since its import takes as long as that of fewbits

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
