"""What aiohttp's server logs, as our events: it prints a traceback for every client that does not speak HTTP."""

from __future__ import annotations

import logging

import structlog
from aiohttp.http_exceptions import HttpProcessingError

REASON_CHARS_MAX = 200
"""What a client sent wrong is quoted in the reason."""

log = structlog.get_logger()


def http_logger() -> logging.Logger:
    """For `web.AppRunner`. No child of the root logger, so that nothing is written twice."""
    logger = logging.Logger("http", logging.INFO)
    logger.addHandler(_Events())
    return logger


class _Events(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            client = record.args[0] if isinstance(record.args, tuple) and record.args else None
            log.info("request_malformed", client=client, status=error.code, reason=_one_line(error.message))
        else:
            log.error("http_failed", reason=record.getMessage(), exc_info=error)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:REASON_CHARS_MAX]
