"""The explorer: controls are moved as a browser moves them, with and without a running loop."""

import asyncio
import inspect
import re
import selectors
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import dspark_lab as lab
from data.make.recipes import write_chats
from dspark_lab.explore import Explorer, Frame, explore_anchors, explore_masks
from dspark_lab.explore.explorer import SETTLE_SECONDS, slider
from tests import explorers
from tests.explorers import CHATS, LENGTHS, TOKENIZER, alert, picture

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock(selectors.DefaultSelector):
    """The time of a loop that never waits: it is moved on to whatever the loop waits for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


def run(clock: Clock, main: Coroutine[Any, Any, Any]) -> Any:
    """Run until it is done in a loop with this clock."""
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def counting(**controls: int) -> tuple[Explorer, list[dict]]:
    """An explorer of sliders that shows their values, and the list of values it has drawn."""
    drawn: list[dict] = []

    def draw(chosen: SimpleNamespace) -> Frame:
        settings = vars(chosen)
        drawn.append(settings)
        if settings["number"] == 13:
            raise ValueError("13 is <b>unlucky</b>")
        return Frame({"settings": pd.DataFrame([settings])}, html=f"<i>{settings}</i>")

    sliders = [slider(name, value, 0, 10**9) for name, value in ({"number": 0} | controls).items()]
    return Explorer("counting", sliders, draw), drawn


def test_an_explorer_draws_once_when_it_is_made_and_at_each_change_without_a_running_loop():
    explorer, drawn = counting(other=5)
    assert drawn == [{"number": 0, "other": 5}] and explorer.frames_drawn == 1
    assert picture(explorer).value == "<i>{'number': 0, 'other': 5}</i>"
    explorer.controls["number"].value = 7
    assert drawn[-1] == explorer.settings == {"number": 7, "other": 5}
    assert picture(explorer).value == "<i>{'number': 7, 'other': 5}</i>"
    assert explorer.frames_drawn == len(drawn) == 2


@pytest.mark.parametrize("pause, drawn_at", [(None, [50]), (0, [50]), (0.1, range(1, 51))])
def test_quick_changes_in_a_running_loop_are_one_redraw_of_the_newest_value(pause, drawn_at):
    explorer, drawn = counting()

    async def drag() -> None:
        for value in range(1, 51):
            explorer.controls["number"].value = value
            if pause is not None:
                await asyncio.sleep(pause)
        await asyncio.sleep(SETTLE_SECONDS)

    run(Clock(), drag())
    assert drawn[1:] == [{"number": number} for number in drawn_at]
    assert explorer.frames_drawn == len(drawn)
    assert picture(explorer).value == "<i>{'number': 50}</i>"


def test_a_drag_that_outpaces_the_drawing_is_seen_while_it_goes_on_and_leaves_no_stale_frame():
    clock, drawn = Clock(), []

    def slow(chosen: SimpleNamespace) -> Frame:
        clock.now += 0.04
        drawn.append(chosen.number)
        return Frame({"one": pd.DataFrame([chosen.number])}, html=str(chosen.number))

    explorer = Explorer("slow", [slider("number", 0, 0, 1000)], slow)

    async def drag() -> int:
        for value in range(1, 101):
            explorer.controls["number"].value = value
            await asyncio.sleep(0.002)
        before = len(drawn)
        await asyncio.sleep(0.3)
        return before

    before = run(clock, drag())
    assert 3 < before < 50
    assert drawn == sorted(set(drawn)) and drawn[-1] == 100
    assert len(drawn) - before <= 1


def test_what_is_read_or_shown_before_the_loop_goes_on_is_of_the_newest_value():
    explorer, drawn = counting()
    number = explorer.controls["number"]

    async def change_and_read() -> list:
        number.value = 4
        number.value = 5
        read = [explorer.table["number"][0], explorer.tables["settings"]["number"][0]]
        number.value = 6
        read.append(explorer._repr_mimebundle_())
        await asyncio.sleep(0.1)
        return read

    *read, bundle = run(Clock(), change_and_read())
    assert read == [5, 5] and drawn[1:] == [{"number": 5}, {"number": 6}]
    assert bundle["text/plain"] == "counting(number=6)"
    assert bundle["text/html"] == "<i>{'number': 6}</i>"


def test_the_picture_is_replaced_in_place_also_by_a_sentence_that_leaves_no_table_and_can_be_left():
    explorer, _ = counting()
    shown, children = picture(explorer), explorer.children
    controls = explorer.children[0].children
    values: list[str] = []
    shown.observe(lambda change: values.append(change["new"]), names="value")
    for number in (3, 13):
        explorer.controls["number"].value = number
    assert alert(explorer) == "13 is &lt;b&gt;unlucky&lt;/b&gt;"
    assert explorer.tables == {}
    with pytest.raises(ValueError, match="counting has nothing to show: 13 is <b>unlucky</b>"):
        explorer.table  # noqa: B018
    explorer.controls["number"].value = 4
    assert explorer.table["number"].tolist() == [4]
    assert values == [
        "<i>{'number': 3}</i>",
        '<p role="alert">13 is &lt;b&gt;unlucky&lt;/b&gt;</p>',
        "<i>{'number': 4}</i>",
    ]
    assert explorer.children is children and picture(explorer) is shown
    assert explorer.children[0].children is controls


@pytest.mark.parametrize("explore", [explore_anchors, explore_masks])
@pytest.mark.parametrize("as_given", [str, Path])
def test_a_users_own_file_and_tokenizer_folder_are_one_call(tmp_path, explore, as_given):
    write_chats(CHATS, tmp_path / "mine.jsonl")
    explorers.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = as_given(tmp_path / "mine.jsonl"), as_given(tmp_path / "tokenizer")
    explorer = explore(*given, num_anchors=2, block_size=3, conversation=1)
    expected = explorers.tables_by_hand([1], LENGTHS[1], 2, 3)["blocks"]
    pd.testing.assert_frame_equal(explorer.tables["blocks"], expected)
    assert explorer.controls["conversation"].max == 2


@pytest.mark.parametrize("explore", [explore_anchors, explore_masks])
def test_what_cannot_be_read_is_refused_at_once(tmp_path, explore):
    file = write_chats(CHATS[:1], tmp_path / "mine.jsonl") or tmp_path / "mine.jsonl"
    file.write_text(file.read_text() + '{"messages": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: messages must be a list")):
        explore(file, TOKENIZER)
    with pytest.raises(FileNotFoundError):
        explore(tmp_path / "nowhere.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="at least one conversation"):
        explore([], TOKENIZER)
    for conversation in (3, 99):
        with pytest.raises(ValueError, match=rf"conversation must .*, got {conversation}"):
            explore(CHATS, TOKENIZER, conversation=conversation)


@pytest.mark.parametrize("name", [name for name in lab.__all__ if name.startswith("explore_")])
def test_an_explorers_controls_start_where_its_arguments_say(name):
    """Every argument beyond the first three has a default, and none is hidden."""
    parameters = inspect.signature(getattr(lab, name)).parameters.values()
    assert all(p.default is not p.empty for p in parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
