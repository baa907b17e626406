"""Files and folders that are complete or not there."""

import json
from types import SimpleNamespace

import pytest
import torch

from dspark_lab.files import (
    previous_version,
    read_json,
    remove_partial,
    replaced_whole,
    upload,
    write_json,
    written_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), written_whole(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_at_the_end_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "run"
    with replaced_whole(folder) as partial:
        (partial / "one").write_text("1")
        assert not folder.exists()
    with pytest.raises(KeyError), replaced_whole(folder) as partial:
        (partial / "two").write_text("2")
        raise KeyError
    assert names(folder) == ["one"] and names(folder.parent) == ["run"]
    with replaced_whole(folder) as partial:
        (partial / "two").write_text("2")
    assert names(folder) == ["two"] and names(folder.parent) == ["run"]


def test_what_a_kill_left_is_taken_up_again(tmp_path):
    folder = tmp_path / "run"
    previous_version(folder).mkdir()
    (previous_version(folder) / "old").write_text("")
    with pytest.raises(KeyError), replaced_whole(folder):
        raise KeyError
    assert names(folder) == ["old"]
    (tmp_path / ".run.partial-1").mkdir()
    (tmp_path / ".a.txt.partial-1").write_text("")
    remove_partial(tmp_path)
    assert names(tmp_path) == ["run"]


def test_json_goes_there_and_back(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1]})
    assert read_json(path) == json.loads(path.read_text()) == {"a": [1]}


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "\xff"])
def test_a_broken_json_file_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="a.json must"):
        read_json(path)


def test_a_tensor_on_its_way_to_a_gpu_is_pinned_whole_and_nobody_waits(monkeypatch):
    def pinned(tensor):
        assert tensor.is_contiguous()
        return SimpleNamespace(to=lambda device, non_blocking: (device.type, non_blocking))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    for tensor in (torch.ones(3), torch.ones(3).expand(2, -1), torch.ones(2, 4)[:, :3]):
        assert upload(tensor, "cuda") == ("cuda", True)
    assert upload(torch.ones(2), "meta").device.type == "meta"
