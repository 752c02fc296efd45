"""Event ids: written, read back, refused."""

from __future__ import annotations

import pytest

from controlplane.gateway.cursor import Position, PositionInvalid, Seen, Writer, parse
from controlplane.runtime.ids import RequestId

STREAM = RequestId("0123456789abcdef" * 2)


def id_of(line: bytes) -> str:
    assert line.startswith(b"id: ")
    assert line.endswith(b"\n")
    return line[4:-1].decode()


def test_every_written_id_names_the_position_it_was_written_at():
    writer = Writer(STREAM, 2, Position())
    assert writer.begin(1)
    assert parse(id_of(writer.line()), STREAM) == Position((Seen(), Seen(True, 0)))
    writer.move(1, 7, finished=False)
    assert not writer.begin(1)
    writer.begin(0)
    writer.move(0, 3, finished=True)
    assert parse(id_of(writer.line()), STREAM) == Position((Seen(True, 3, True), Seen(True, 7)))
    assert parse(id_of(writer.end_line()), STREAM).usage


def test_a_writer_goes_on_from_a_position():
    at = Position((Seen(True, 3, True), Seen(), Seen(True, 7)))
    assert parse(id_of(Writer(STREAM, 3, at).line()), STREAM) == at


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        STREAM,
        f"{STREAM}:",
        f"{STREAM}:1,,2",
        f"{STREAM}:-1",
        f"{STREAM}:1!!",
        f"{STREAM}:1:2",
        "f" * 32 + ":1",
    ],
)
def test_what_is_no_id_of_the_stream_is_refused(text: str):
    with pytest.raises(PositionInvalid):
        parse(text, STREAM)
