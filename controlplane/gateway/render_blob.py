"""What a gateway that takes a stream over must know to go on writing it. Travels with the body, opaque to workers."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from controlplane.gateway.text_stream import TextOptions
from controlplane.runtime.ids import DeploymentId, RequestId

RENDER_BYTES_MAX = 64 * 1024
VERSION = 1
_ID_DIGITS = 32

Kind = Literal["completion", "chat", "grpc"]


class BlobUnreadable(ValueError):
    """The blob is none, or of a version that this gateway does not know."""


class RenderBlob(msgspec.Struct, frozen=True, kw_only=True):
    """One journal's part of a response. Fields may be added; a change of meaning raises `version`."""

    version: int = VERSION
    kind: Kind
    # Wall clock, seconds.
    created: int = 0
    include_usage: bool = False
    # This journal's place among those of the response.
    place: int
    places: int
    model: str
    deployment: DeploymentId
    # "": not told, by a gateway of before.
    model_path: str = ""
    tenant: str = ""
    n: int
    echo: bool = False
    # The prompt as the client wrote it, where it is echoed.
    prompt_text: str | None = None
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    logprobs: bool = False
    prompt_only: bool = False

    @property
    def texts(self) -> TextOptions:
        """How its answers are shown."""
        return TextOptions(
            stops=self.stops,
            include_stop=self.include_stop,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs,
            prompt_only=self.prompt_only,
        )


def read_blob(blob: bytes) -> RenderBlob:
    """Raises BlobUnreadable."""
    try:
        read = msgspec.json.decode(blob, type=RenderBlob)
    except msgspec.MsgspecError as error:
        raise BlobUnreadable(f"the stream's description cannot be read: {error}") from error
    if read.version != VERSION:
        raise BlobUnreadable(f"the stream's description is of version {read.version}, not {VERSION}")
    return read


def place_id(stream: RequestId, place: int) -> RequestId:
    """Id of the journal at `place` of the response that `stream` names: the first journal has the stream's own id, and
    those of the others follow from it, so that one id finds them all."""
    if place == 0:
        return stream
    digest = hashlib.blake2b(f"{stream}/{place}".encode(), digest_size=_ID_DIGITS // 2)
    return RequestId(digest.hexdigest())
