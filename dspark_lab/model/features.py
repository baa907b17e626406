"""The target's features of a batch, computed when they are asked for or read from disk.

A document's features depend on nothing but its own tokens, so they can be computed once and put
into any batch afterwards. On disk they lie in safetensors files of a few conversations each, whose
names are checksums of all that they follow from: the target, the layers, the dtype and the tokens.
So a file either holds what is asked for or is not found, a run that was killed goes on where it
stopped, and runs with other settings share a folder without harm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dspark_lab.chats import Batch, Encoded, collate
from dspark_lab.checks import checked
from dspark_lab.files import written_whole
from dspark_lab.model.protocol import Features
from dspark_lab.model.target import Target

__all__ = ["FeatureSource", "cached_features", "live_features"]

# The features of a batch of the given conversations (their places in the list); the tokens of each
# document stand where the batch has them, padding holds zeros or anything else.
FeatureSource = Callable[[Batch], Features]

_PER_FILE = 32


@checked
def live_features(target: Target, layer_ids: Sequence[int]) -> FeatureSource:
    """The target is asked for every batch."""

    def source(batch: Batch) -> Features:
        return target.batch_features(batch, layer_ids)

    return source


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
    """Computes the features that ``folder`` does not hold yet, then reads them from there.

    The batches must be made of ``encoded``: their ``chat_index`` finds a document's features.

    Args:
        target, encoded: the model and the conversations.
        layer_ids: see :meth:`dspark_lab.model.target.Target.features`.
        folder: made where it does not exist; about
            ``tokens * (len(layer_ids) + 1) * hidden_size`` numbers end in it.
        dtype: of the numbers on disk; the target's where None.
        progress: whether to show a bar.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = target.dtype if dtype is None else dtype
    what: list[object] = [_fingerprint(target), list(layer_ids), str(stored)]
    files: list[Path] = []
    # Conversations of similar length go together, so that little is padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    groups = [order[i : i + _PER_FILE] for i in range(0, len(order), _PER_FILE)]
    place: dict[int, tuple[int, int]] = {}
    for group in tqdm(groups, desc="features", disable=not progress):
        some = [encoded[index] for index in group]
        path = folder / f"{_checksum(what, some)}.safetensors"
        if not path.exists():
            _write(path, target, some, layer_ids, stored)
        place |= {index: (len(files), number) for number, index in enumerate(group)}
        files.append(path)
    handles = [safe_open(path, framework="pt", device="cpu") for path in files]

    def source(batch: Batch) -> Features:
        rows, seq_len = batch.input_ids.shape
        hidden = target.hidden_size
        context = torch.zeros(rows, seq_len, len(layer_ids) * hidden, dtype=stored)
        last = torch.zeros(rows, seq_len, hidden, dtype=stored)
        for row, (indices, lengths) in enumerate(
            zip(batch.chat_index.tolist(), batch.seq_lens.tolist(), strict=True)
        ):
            first = 0
            for index, length in zip(indices, lengths, strict=True):
                if index < 0:
                    continue
                file, number = place[index]
                tokens = slice(first, first + length)
                context[row, tokens] = handles[file].get_tensor(f"{number}.context")
                last[row, tokens] = handles[file].get_tensor(f"{number}.last")
                first += length
        device = batch.input_ids.device
        return Features(context.to(device), last.to(device))

    return source


def _write(
    path: Path,
    target: Target,
    some: Sequence[Encoded],
    layer_ids: Sequence[int],
    dtype: torch.dtype,
) -> None:
    batch = collate(some, pad_token_id=0).to(target.device)
    features = target.batch_features(batch, layer_ids)
    tensors = {}
    for number, item in enumerate(some):
        length = len(item)
        tensors[f"{number}.context"] = features.context[number, :length].to("cpu", dtype)
        tensors[f"{number}.last"] = features.last[number, :length].to("cpu", dtype)
    with written_whole(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def _fingerprint(target: Target) -> str:
    """Changes with the target's weights."""
    sums = {name: p.double().sum().item() for name, p in target.model.named_parameters()}
    return hashlib.sha256(json.dumps([str(target.dtype), sums]).encode()).hexdigest()


def _checksum(what: list[object], some: Sequence[Encoded]) -> str:
    tokens = [item.input_ids.tolist() for item in some]
    return hashlib.sha256(json.dumps([what, tokens]).encode()).hexdigest()[:32]
