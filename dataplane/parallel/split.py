"""How a count is cut over ranks. Pure: every rank computes every rank's part from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]
"""Half-open [start, stop)."""


class SplitError(ValueError):
    """The counts do not allow a correct cut; the text has the numbers."""


def cut(count: int, parts: int, index: int) -> Range:
    """Part `index` of `count` items in `parts` contiguous parts; the first `count % parts` parts are one longer."""
    size, longer = divmod(count, parts)
    start = index * size + min(index, longer)
    return start, start + size + (index < longer)


def cut_padded(count: int, parts: int, index: int) -> Range:
    """Part `index` when all parts have the same length ⌈count / parts⌉ and the last ones run past the end.

    The range is clipped to `count`: the caller pads what is missing.
    """
    size = -(-count // parts)
    return min(index * size, count), min((index + 1) * size, count)


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """One rank's attention heads.

    A key/value head and the query heads that read it stay together. With fewer key/value heads than ranks, `copies`
    ranks hold the same key/value head and divide its query heads.
    """

    query: Range
    key_value: Range
    copies: int

    @property
    def query_heads(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def key_value_heads(self) -> int:
        return self.key_value[1] - self.key_value[0]


def split_heads(query_heads: int, key_value_heads: int, ranks: int, rank: int) -> HeadSplit:
    """The heads of `rank`. Uneven counts are cut as evenly as whole groups allow.

    Raises SplitError when a rank would be left without a query head.
    """
    if query_heads % key_value_heads:
        raise SplitError(f"{query_heads} query heads are no multiple of {key_value_heads} key/value heads")
    group = query_heads // key_value_heads
    if key_value_heads >= ranks:
        first, last = cut(key_value_heads, ranks, rank)
        return HeadSplit(query=(first * group, last * group), key_value=(first, last), copies=1)
    head = rank * key_value_heads // ranks
    sharers = [other for other in range(ranks) if other * key_value_heads // ranks == head]
    if group < len(sharers):
        raise SplitError(
            f"{query_heads} query heads over {key_value_heads} key/value heads cannot be cut over {ranks} ranks: "
            f"{len(sharers)} ranks would share {group} query heads"
        )
    first, last = cut(group, len(sharers), sharers.index(rank))
    return HeadSplit(query=(head * group + first, head * group + last), key_value=(head, head + 1), copies=len(sharers))


def split_layers(layers: int, stages: int, stage: int) -> Range:
    """The layers of a pipeline stage. Later stages get fewer: the last one also computes the vocabulary head."""
    if layers < stages:
        raise SplitError(f"{layers} layers cannot be cut over {stages} pipeline stages")
    return cut(layers, stages, stage)
