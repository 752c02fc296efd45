"""aiohttp's log lines become ours: a client's fault is one line, our own keeps its traceback."""

from __future__ import annotations

from aiohttp.http_exceptions import BadHttpMessage
from structlog.testing import capture_logs

from controlplane.gateway.http_log import REASON_CHARS_MAX, http_logger


def test_a_clients_fault_is_one_short_line():
    with capture_logs() as logged:
        http_logger().exception(
            "Error handling request from %s", "h", exc_info=BadHttpMessage("bad:\n\n  " + "x" * 999)
        )
    (line,) = logged
    assert (line["event"], line["log_level"], line["client"], line["status"]) == ("request_malformed", "info", "h", 400)
    assert line["reason"] == "bad: " + "x" * (REASON_CHARS_MAX - 5)
    assert "exc_info" not in line


def test_our_own_fault_keeps_its_traceback():
    fault = ValueError("ours")
    with capture_logs() as logged:
        http_logger().exception("Unhandled exception", exc_info=fault)
    (line,) = logged
    assert (line["event"], line["log_level"], line["exc_info"]) == ("http_failed", "error", fault)
