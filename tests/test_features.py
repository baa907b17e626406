"""Features on disk: the same numbers, computed once, whatever happens in between."""

import pytest
import torch

from dspark_lab.chats import Batch, collate, pack
from dspark_lab.model import Target
from dspark_lab.model import features as lab
from tests.samples import random_chats, tiny_target

IDS = (0, 1)


def named(batch: Batch, places: list[int]) -> Batch:
    """The batch with its documents' places in the whole list of conversations."""
    batch.chat_index.copy_(torch.tensor([*places, -1])[batch.chat_index])
    return batch


@pytest.mark.parametrize("packed", [False, True])
def test_cached_features_are_those_of_the_target(packed, tmp_path):
    target, chats = tiny_target(), random_chats(70)
    cached = lab.cached_features(target, chats, IDS, tmp_path, progress=False)
    places = [3, 41, 68, 7, 12]
    some = [chats[place] for place in places]
    batch = named(pack(some, 90, 0) if packed else collate(some, 0), places)
    found, live = cached(batch), lab.live_features(target, IDS)(batch)
    kept = batch.attention_mask
    torch.testing.assert_close(found.context[kept], live.context[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.last[kept], live.last[kept], atol=1e-5, rtol=1e-5)
    assert found.context.shape == live.context.shape
    with pytest.raises(ValueError, match="batch must be of stored conversations, got index -1"):
        cached(Batch.of_tokens(batch.input_ids, batch.loss_mask))


def count_forwards(monkeypatch) -> list[int]:
    """How many rows each forward has from here on."""
    calls, whole = [], Target.batch_features

    def counted(self, batch, layer_ids):
        calls.append(len(batch.input_ids))
        return whole(self, batch, layer_ids)

    monkeypatch.setattr(Target, "batch_features", counted)
    return calls


@pytest.mark.parametrize("change", ["weights", "layers", "dtype", "tokens"])
def test_a_change_of_anything_is_noticed(change, tmp_path, monkeypatch):
    target, chats, ids, dtype = tiny_target(), random_chats(10), IDS, None
    lab.cached_features(target, chats, ids, tmp_path, progress=False)
    if change == "weights":
        target.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    elif change == "layers":
        ids = (0,)
    elif change == "dtype":
        dtype = torch.bfloat16
    else:
        chats[4].input_ids[5] += 1
    calls = count_forwards(monkeypatch)
    source = lab.cached_features(target, chats, ids, tmp_path, dtype=dtype, progress=False)
    assert sum(calls) == 10
    batch = named(collate(chats[4:5], 0), [4])
    live = lab.live_features(target, ids)(batch)
    torch.testing.assert_close(
        source(batch).context, live.context.to(dtype or torch.float32), atol=1e-5, rtol=1e-2
    )


def test_a_killed_write_leaves_nothing_and_what_is_there_is_not_computed_again(
    tmp_path, monkeypatch
):
    target, chats = tiny_target(), random_chats(70)
    written, done = lab.save_file, []

    def full(tensors, path):
        if done:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        done.append(path)
        written(tensors, path)

    monkeypatch.setattr(lab, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        lab.cached_features(target, chats, IDS, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(lab, "save_file", written)
    calls = count_forwards(monkeypatch)
    for _ in range(2):
        lab.cached_features(target, chats, IDS, tmp_path, progress=False)
        assert sum(calls) == 70 - 32
