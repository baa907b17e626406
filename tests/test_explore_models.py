"""Models that explorers load: refused at the call, their progress, and where they can be left."""

import threading
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from data.make.recipes import write_chats
from dspark_lab import explore_acceptance, explore_serving, explore_training_budget
from dspark_lab.chats import encode_all
from dspark_lab.explore.models import open_models
from dspark_lab.explore.work import Cancelled, Progress, Worker
from dspark_lab.model import save_drafter
from dspark_lab.serving import measure_engine
from tests.explorers import CHATS, TOKENIZER, alert, chat, panel
from tests.word_pair import TEXTS, answers, drafter, target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may begin."""
    monkeypatch.setattr(Worker, "start", None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder of a drafter."""
    folder = tmp_path_factory.mktemp("models") / "drafter"
    save_drafter(drafter(), folder)
    return folder


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("call", [explore_acceptance, explore_serving])
def test_what_needs_no_loading_is_refused_at_the_call_with_the_folder_searched(
    call, stored, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for path in ("./nowhere", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no folder nowhere .* in {tmp_path}$"):
            call(path, stored)
        with pytest.raises(FileNotFoundError, match=f"no folder nowhere .* in {tmp_path}$"):
            call(target(), path)
    # A name without a dot may be one of the hub.
    for name in ("nowhere", "nowhere/model"):
        with pytest.raises(FileNotFoundError, match=f"in {tmp_path}.*under the name {name}"):
            call(name, stored)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}/nowhere, .*name nowhere/model"):
        call(target(), "nowhere/model")
    with pytest.raises(FileNotFoundError, match=f"none.jsonl must be in {tmp_path}, but is not"):
        call(target(), stored, "none.jsonl")
    (stored.parent / "empty").mkdir(exist_ok=True)
    for given in ((target(), stored.parent / "empty"), (stored.parent / "empty", stored)):
        with pytest.raises(FileNotFoundError, match="must hold"):
            call(*given)
    for wrong in ({"max_new_tokens": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be >= "):
            call(target(), stored, TEXTS, **wrong)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperatures": (0.0, -1.0)}, "each of temperatures must be >= 0, got -1.0"),
        ({"temperature": 0.5}, r"temperature must be one of \(0.0, 1.0\), got 0.5"),
        ({"draft_length": 3}, "draft_length must be at most 2, a block's, got 3"),
        ({"requests": 3}, "requests must be one of"),
    ],
)
def test_serving_refuses_at_the_call_what_no_decoding_can_change(stored, wrong, message):
    with pytest.raises(ValueError, match=message):
        explore_serving(target(), stored, TEXTS, **wrong)


def test_what_loading_alone_can_tell_is_a_sentence_and_raised_by_the_table(stored, tmp_path):
    other = target().model.config.to_dict()
    folder = tmp_path / "target"
    target().model.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert other["vocab_size"] == 66
    explorer = explore_acceptance(folder, stored, TEXTS)
    with pytest.raises(ValueError, match="explore_acceptance has nothing to show: .*cut off"):
        explorer.table  # noqa: B018
    assert "cut off" in alert(explorer) and panel(explorer).progress == {}


def told(call: Any) -> list[tuple[float, float, str]]:
    """All that a work tells of its progress."""
    said: list[tuple[float, float, str]] = []
    call(Progress(lambda *one: said.append(one)))
    return said


def left_at_each_step(call: Any) -> int:
    """How many steps a work tells; it ends at the one after it was cancelled."""
    steps = len(told(call))
    for last in (1, steps // 2, steps - 1):
        seen: list[object] = []

        progress = Progress(lambda *one, seen=seen: seen.append(one))
        cancelled = Mock()
        cancelled.is_set = lambda seen=seen, last=last: len(seen) == last
        progress.cancelled = cancelled
        with pytest.raises(Cancelled):
            call(progress)
        assert len(seen) == last, "nothing went on"
    return steps


def test_answers_are_counted_and_can_be_left_at_each_layer_of_each_batch():
    models = open_models(target(), {"mine": drafter()}, TEXTS)(Progress())
    options = {"temperature": 1.0, "max_new_tokens": 6, "seed": 0}

    def decode(progress: Progress, batch_size: int = 2) -> Any:
        return models.decode("mine", batch_size, progress, **options)

    said = told(decode)
    layers = len(target().model.model.layers)
    assert said[0] == (1, layers, "mine reads 3 prompts: layer")
    assert said[layers - 1][:2] == (layers, layers)
    done = [one for one, total, words in said[layers:] if words.endswith(": token")]
    assert done == sorted(done) and 0 < done[-1] <= 3 * 6
    # Every read of either batch, each layer by itself.
    assert left_at_each_step(decode) > 2 * 2 * layers
    run = decode(Progress())
    assert run.trace.equals(answers(drafter(), TEXTS, batch_size=2, **options).trace)
    assert not any(layer._forward_pre_hooks for layer in target().model.model.layers)


def test_measuring_is_counted_round_by_round():
    sizes = {"requests": (1, 2), "draft_lengths": (1,), "repeats": 3, "warm_up": 1}

    def measure(progress: Progress) -> None:
        count = lambda done, total: progress(done, total, "")  # noqa: E731
        measure_engine(target(), drafter(), context_length=4, progress=count, **sizes)

    # Two loads, with a draft and without, of four rounds each.
    assert [one[:2] for one in told(measure)] == [(done, 16) for done in range(16)]
    assert left_at_each_step(measure) == 16


def test_encoding_is_counted_conversation_by_conversation_or_in_bytes_of_a_large_file(
    tmp_path, monkeypatch
):
    shown = explore_training_budget(CHATS, "pocket", TOKENIZER, seq_len=256, num_anchors=8)
    assert shown.tables
    chosen = SimpleNamespace(**shown.settings)

    def encoded(chats: Any) -> list[tuple[float, float, str]]:
        """What is told of encoding, by an explorer that has not begun."""
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "start", lambda *_: None)
            fresh = explore_training_budget(chats, "pocket", TOKENIZER, seq_len=256, num_anchors=8)
        return [one for one in told(partial(fresh._draw, chosen)) if "encoding" in one[2]]

    assert encoded(CHATS) == [(done, 3, "encoding conversation") for done in range(3)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dspark_lab.training.data.LARGE_FILE", 0)
    file = tmp_path / "chats.jsonl"
    write_chats(CHATS, file)
    size = file.stat().st_size / 1e6
    begin, end = encoded(file)
    assert begin == (0, size, "encoding the file: MB") and end[:2] == (size, size)


def test_a_set_that_was_left_goes_on_where_it_stopped(tmp_path):
    chats = [chat(5, f"c{i}") for i in range(200)]
    seen: list[float] = []

    def stop(done: float, total: float) -> None:
        seen.append(done / total)
        if len(seen) == 2:
            raise Cancelled

    options = {"cache": tmp_path / "cache", "workers": 1}
    with pytest.raises(Cancelled):
        encode_all(chats, TOKENIZER, progress=stop, **options)
    assert seen[0] == 0 and 0 < seen[1] < 1
    rest: list[float] = []
    whole = encode_all(chats, TOKENIZER, progress=lambda done, total: rest.append(done), **options)
    assert len(whole) == 200 and rest == sorted(rest) and rest[-1] == 200
    assert rest[1] == 200 * seen[1], "the part that was done is there"


def test_cancel_ends_a_slow_targets_first_read_with_the_panel_telling_its_layers():
    """A target whose every layer waits: the bar moves from the first, and Cancel ends it."""
    begun, may_go_on = threading.Event(), threading.Event()
    slow = target().model.model.layers[1]

    def wait(*_: object) -> None:
        begun.set()
        assert may_go_on.wait(60)

    hook = slow.register_forward_pre_hook(wait)
    try:
        explorer = explore_acceptance(target(), {"mine": drafter()}, TEXTS)
        assert begun.wait(60)
        now = panel(explorer).progress
        assert now["words"] == "mine reads 3 prompts: layer" and now["counts"] == "1 of 3 (33 %)"
        explorer._act({"action": "cancel"})
        may_go_on.set()
        assert alert(explorer).startswith("Cancelled.")
        assert panel(explorer).state["again"] and panel(explorer).progress == {}
    finally:
        hook.remove()
