"""Records of acceptance, made up of requests whose rounds are known."""

from typing import Any

import numpy as np
import pandas as pd

from dspark_lab.records import AcceptanceRecord


def record(histograms: Any, tokens: Any = None, **about: Any) -> AcceptanceRecord:
    """Of requests, each with its rounds by accepted tokens."""
    counts = np.array(histograms, dtype=float)
    rounds, accepted = counts.sum(axis=1), counts @ np.arange(counts.shape[1])
    passed = counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    reached = np.column_stack([rounds, passed[:, :-1]])
    numbers = range(1, len(counts) + 1)
    lines = pd.DataFrame({"line": numbers, "rounds": rounds, "accepted": accepted})
    lines = lines.assign(drafted=rounds * passed.shape[1], **about)
    if tokens is not None:
        lines["output_tokens"] = tokens
    return AcceptanceRecord("test", "request", lines, reached, passed, True, "as given")


def drawn(rates: Any, requests: int = 300, seed: int = 0, **about: Any) -> AcceptanceRecord:
    """Requests of ten rounds, whose slots are accepted at the rates."""
    rng = np.random.default_rng(seed)
    passes = rng.random((requests, 10, len(rates))) < np.array(rates)
    accepted = passes.cumprod(axis=2).sum(axis=2)
    counts = np.stack([(accepted == k).sum(axis=1) for k in range(len(rates) + 1)], axis=1)
    tokens = 1 + counts.sum(axis=1) + counts @ np.arange(len(rates) + 1)
    return record(counts, tokens, **about)
