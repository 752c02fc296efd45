"""The shells' logs are not the story: they are dropped while a world runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

import structlog


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """No structlog line below "critical" leaves within."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
