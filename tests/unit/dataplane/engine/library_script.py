"""A script as a reader of the README would write it: two replicas, run by itself or by torchrun."""

from __future__ import annotations

import json
import os
import sys

from controlplane.runtime.messages.common import Sampling
from dataplane.engine.local import open_engine

if __name__ == "__main__":
    model, prompts = sys.argv[1], json.loads(sys.argv[2])
    with open_engine(model, data=2, dtype="float32", kv_cache_tokens=512) as engine:
        answers = engine.generate(prompts, Sampling(temperature=0, max_tokens=8, ignore_eos=True))
        again = engine.generate(prompts[:1], Sampling(temperature=0, max_tokens=8, ignore_eos=True))
    assert again[0].tokens == answers[0].tokens
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps([[answer.tokens, answer.text] for answer in answers]))
