"""Fills a fitted model with its values: from files, and at the same time from ranks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
import torch

from dataplane.models.fitted import Fitted
from dataplane.models.peers import PeerReader
from dataplane.models.pieces import Box, portions, size
from dataplane.models.tensor_file import TensorReader
from dataplane.models.weights import Report, Source, tensors_of
from dataplane.models.work_list import PORTION_BYTES, Slice, WorkList

_log = structlog.get_logger()

FILES = "files"


class Loading:
    """The values of one model on their way. `run` may be interrupted, by an exception of its `report`, and goes on from
    there when it is called again."""

    def __init__(
        self,
        fitted: Fitted,
        open_source: Callable[[TensorReader], Source],
        content: str,
        aliases: dict[str, str],
        device: torch.device,
        *,
        cut: bool,
    ) -> None:
        """`cut`: the source gives a part of a tensor for a part of the work. `content`: what the weights are made of;
        `aliases`: other names of tied tensors; both for peers."""
        self._open_source = open_source
        self._content = content
        self._aliases = aliases
        self._device = device
        self._cut = cut
        self._work = WorkList(_slices(fitted, cut=cut))
        # Bytes by where they came from: FILES, or a peer's address.
        self.bytes_from: dict[str, int] = {FILES: 0}

    def run(self, report: Report, sources: Sequence[str] = ()) -> None:
        """Until all is there. `sources`: addresses of ranks that hold weights of the same model. What they have may be
        taken from either side, so what they lack or fail to give costs nothing but its reading. Raises Rejected."""
        chosen = sources if self._cut else ()
        peers = [PeerReader(item, self._content, self._aliases, self._work, self._device) for item in chosen]
        try:
            with torch.no_grad(), TensorReader() as reader:
                source = self._open_source(reader)
                self._read(source, report)
                _stop(peers)
                # What they had under way where the two met.
                self._read(source, report)
        finally:
            _stop(peers)
            for address, peer in zip(chosen, peers, strict=True):
                self.bytes_from[address] = self.bytes_from.get(address, 0) + peer.bytes
        report("weights", 1.0)
        _log.info("weights_read", **self.bytes_from)

    def _read(self, source: Source, report: Report) -> None:
        while (number := self._work.take_first()) is not None:
            item = self._work[number]
            source(item.piece, item.local)
            self.bytes_from[FILES] += self._work.finish(number)
            report("weights", self._work.share_done)


def _stop(peers: Iterable[PeerReader]) -> None:
    for peer in peers:
        peer.stop()


def _slices(fitted: Fitted, *, cut: bool) -> Iterator[Slice]:
    """Every value of the state dict once. Cells that no piece covers are zeroed."""
    with torch.no_grad():
        for tensor, pieces in tensors_of(fitted):
            if sum(piece.values for piece in pieces) < tensor.numel():
                tensor.zero_()
            for piece in pieces:
                for box in _boxes(piece.at, tensor.itemsize) if cut else [piece.at]:
                    yield Slice(piece.within(box), tensor.data)


def _boxes(box: Box, itemsize: int) -> Iterable[Box]:
    return portions(box, PORTION_BYTES // itemsize) if size(box) else ()
