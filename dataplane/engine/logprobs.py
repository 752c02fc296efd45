"""Log probabilities of given tokens and of the best ones, from raw logits.

Shape letters: V vocabulary, C best tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from controlplane.runtime.packing import pack_f32, pack_u32
from dataplane.frames import Logprobs, SequenceId


def describe(
    logits_V: Tensor, token: int, best: int, sequence: SequenceId, index: int, *, prompt: bool = False
) -> Logprobs:
    """The log probability of `token` in this row, its rank, and those of the `best` likeliest tokens, equal ones by
    id. Reads the device."""
    values_V = torch.log_softmax(logits_V.float(), -1)
    chosen = values_V[token]
    count = min(best, values_V.shape[0])
    values_C, ids_C = values_V.topk(count)
    pairs = sorted(zip(values_C.tolist(), ids_C.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    return Logprobs(
        sequence=sequence,
        index=index,
        chosen=float(chosen),
        chosen_rank=int((values_V > chosen).sum()) + 1,
        top_ids=pack_u32([token_id for _, token_id in pairs]),
        top_values=pack_f32([value for value, _ in pairs]),
        prompt=prompt,
    )
