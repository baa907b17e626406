"""The target's features of a batch, computed when they are asked for or read from disk.

A document's features depend on its own tokens alone, so they are computed once and put into any
batch. On disk they lie in safetensors files of a few conversations each, named by a checksum of
the target, the layers, the dtype and the tokens: a run that was killed goes on where it stopped,
and runs with other settings share a folder without harm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dspark_lab.chats import Batch, Encoded, collate, token_counts
from dspark_lab.checks import checked
from dspark_lab.files import upload, written_whole
from dspark_lab.model.protocol import Features
from dspark_lab.model.target import Target

# The features of a batch; those of padding mean nothing.
FeatureSource = Callable[[Batch], Features]

_PER_FILE = 32


@checked
def live_features(target: Target, layer_ids: Sequence[int]) -> FeatureSource:
    """Ask the target for every batch."""
    return partial(target.batch_features, layer_ids=layer_ids)


@checked
def cached_features(
    target: Target,
    encoded: Sequence[Encoded],
    layer_ids: Sequence[int],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> FeatureSource:
    """Compute the features that ``folder`` does not hold yet, then read them from there.

    The batches must be made of ``encoded``: their ``chat_index`` finds a document's features.

    ``layer_ids`` as in :meth:`dspark_lab.model.target.Target.features`. The folder gets
    ``tokens * (len(layer_ids) + 1) * hidden_size`` numbers of ``dtype``, the target's where None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = target.dtype if dtype is None else dtype
    weights = {name: p.double().sum().item() for name, p in target.model.named_parameters()}
    settings = [_checksum(str(target.dtype), weights), list(layer_ids), str(stored)]
    # Conversations of similar length go together, so that little is padding.
    order = np.argsort(token_counts(encoded), kind="stable").tolist()
    groups = [order[i : i + _PER_FILE] for i in range(0, len(order), _PER_FILE)]
    places: dict[int, tuple[Path, int]] = {}
    for group in tqdm(groups, desc="features", disable=not progress):
        some = [encoded[index] for index in group]
        name = _checksum(settings, [item.input_ids.tolist() for item in some])
        path = folder / f"{name[:32]}.safetensors"
        if not path.exists():
            features = target.batch_features(collate(some, 0).to(target.device), layer_ids)
            tensors = {}
            for number, item in enumerate(some):
                for part in ("context", "last"):
                    state = getattr(features, part)[number, : len(item)]
                    tensors[f"{number}.{part}"] = state.to("cpu", stored).contiguous()
            with written_whole(path) as partial_file:
                save_file(tensors, partial_file)
        places |= {index: (path, number) for number, index in enumerate(group)}
    # A file of each group would be more than a process may hold open.
    opened = lru_cache(maxsize=128)(partial(safe_open, framework="pt", device="cpu"))

    def source(batch: Batch) -> Features:
        rows, hidden = batch.input_ids.shape, target.hidden_size
        context = torch.zeros(*rows, len(layer_ids) * hidden, dtype=stored)
        last = torch.zeros(*rows, hidden, dtype=stored)
        for row, documents in enumerate(batch.documents):
            start = 0
            for index, length in documents:
                if index not in places:
                    raise ValueError(f"batch must be of stored conversations, got index {index}")
                path, number = places[index]
                file: Any = opened(path)
                tokens = slice(start, start + length)
                context[row, tokens] = file.get_tensor(f"{number}.context")
                last[row, tokens] = file.get_tensor(f"{number}.last")
                start += length
        device = batch.input_ids.device
        return Features(upload(context, device), upload(last, device))

    return source


def _checksum(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
