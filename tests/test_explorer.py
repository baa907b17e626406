"""The explorer: its controls moved as a browser moves them, its work, and what it writes."""

import builtins
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import textwrap
import threading
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import dspark_lab as lab
from data.make.recipes import write_chats
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import encode, one_row
from dspark_lab.explore import Explorer, Frame, explore_anchors, explore_masks
from dspark_lab.explore.controls import (
    answer_at_once,
    checkbox,
    dropdown,
    number_slider,
    selection_slider,
    slider,
)
from dspark_lab.explore.style import new_figure
from dspark_lab.explore.widget import WidgetView, module, page
from dspark_lab.explore.work import Progress, threads_for
from tests import explorers
from tests.explorers import CHATS, LENGTHS, TOKENIZER, alert, edit, panel, picture
from tests.rule_in_node import needs_node

pytestmark = pytest.mark.usefixtures("one_thread")


def some_figure() -> Figure:
    figure, ax = new_figure(3, 2)
    ax.plot([1, 2])
    return figure


def counting(**options: Any) -> tuple[Explorer, list[dict]]:
    """An explorer of all kinds of controls, and the settings that it has drawn; 13 is refused."""
    drawn: list[dict] = []

    def draw(chosen: SimpleNamespace) -> Frame:
        drawn.append(vars(chosen))
        if chosen.number == 13:
            raise ValueError("13 is <b>unlucky</b>")
        tables = {"settings": pd.DataFrame([vars(chosen)]), "more": pd.DataFrame({"x": [1, 2]})}
        best = {"recommended": {"number": 7, "size": 16}}
        return Frame(tables, some_figure, html=f"<i>{chosen.number}</i>", **best)

    controls = [
        slider("number", 0, 0, 100),
        number_slider("share", 0.5, 0.0, 1.0),
        checkbox("on", False),
        dropdown("kind", "a", ("a", "b")),
        selection_slider("size", 8, (4, 8, 16)),
    ]
    return Explorer("counting", controls, draw, **options), drawn


START = {"number": 0, "share": 0.5, "on": False, "kind": "a", "size": 8}


def state(explorer: Explorer, name: str) -> dict[str, Any]:
    """A control as a browser is given it."""
    [found] = [one for one in panel(explorer).state["controls"] if one["name"] == name]
    return found


def test_it_draws_once_when_it_is_made_and_at_each_change():
    explorer, drawn = counting()
    assert drawn == [START] and explorer.frames_drawn == 1
    explorer.controls["number"].value = 7
    assert drawn[-1] == explorer.settings == START | {"number": 7}
    assert picture(explorer).value.endswith("<i>7</i>") and explorer.frames_drawn == 2
    explorer.controls["number"].value = 7
    assert len(drawn) == 2


def test_what_a_browser_sets_arrives_in_one_draw_and_comes_back_with_its_turn():
    explorer, drawn = counting()
    edit(explorer, number=9, share=0.33, on=True, kind=1, size=2)
    chosen = {"number": 9, "share": 0.33, "on": True, "kind": "b", "size": 16}
    assert drawn[1:] == [chosen] and explorer.settings == chosen
    assert panel(explorer).state["turn"] == 1
    assert [state(explorer, name)["value"] for name in chosen] == [9, 0.33, True, 1, 2]


def test_a_number_is_moved_into_its_range_and_never_contradicts_the_picture():
    explorer, drawn = counting()
    edit(explorer, number=1000, share=-3, size=99)
    assert drawn[-1] == START | {"number": 100, "share": 0.0, "size": 16}
    assert state(explorer, "number")["value"] == 100 and state(explorer, "size")["value"] == 2
    explorer.controls["number"].value = -5
    assert drawn[-1]["number"] == explorer.controls["number"].value == 0
    for refused in (1.5, True, "3"):
        with pytest.raises(TypeError, match="number must be"):
            explorer.controls["number"].value = refused
    with pytest.raises(ValueError, match="kind must be one of"):
        explorer.controls["kind"].value = "c"
    edit(explorer, number=None)
    assert explorer.settings["number"] == 0


def test_a_control_without_effect_says_why():
    def reasons(chosen: SimpleNamespace) -> dict[str, str]:
        return {} if chosen.on else {"share": "it is off"}

    explorer, _ = counting(reasons=reasons)
    assert state(explorer, "share")["reason"] == "it is off"
    assert explorer.controls["share"].disabled and not explorer.controls["number"].disabled
    edit(explorer, on=True)
    assert state(explorer, "share")["reason"] == "" and not explorer.controls["share"].disabled


def test_a_problem_stands_beside_the_last_picture_leaves_no_table_and_can_be_left():
    explorer, _ = counting()
    explorer.controls["number"].value = 3
    before = picture(explorer).value
    explorer.controls["number"].value = 13
    assert alert(explorer) == "13 is <b>unlucky</b>" and panel(explorer).state["kept"]
    assert picture(explorer).value == before and explorer.tables == {}
    with pytest.raises(ValueError, match="counting has nothing to show: 13 is <b>unlucky</b>"):
        explorer.table  # noqa: B018
    bundle = explorer._repr_mimebundle_()
    assert "image/png" not in bundle and "13 is" in bundle["text/plain"]
    explorer.controls["number"].value = 4
    assert panel(explorer).state["problem"] == "" and explorer.table["number"].tolist() == [4]


def test_reset_and_what_is_recommended_are_one_draw_each():
    explorer, drawn = counting()
    explorer.choose(**explorer._frame.recommended)
    assert drawn[1:] == [START | {"number": 7, "size": 16}]
    assert panel(explorer).state["recommended"] == {"number": 7, "size": 2}
    assert panel(explorer).state["starts"] == START | {"kind": 0, "size": 1}
    explorer.reset()
    assert drawn[2:] == [START] and explorer.settings == START
    with pytest.raises(ValueError, match=r"settings must be some of .*, got \['nowhere'\]"):
        explorer.choose(nowhere=1)


def test_the_code_is_the_call_that_makes_the_same_view():
    names = {"chats": CHATS, "tokenizer": TOKENIZER}
    explorer = explorers.masks(conversation=1)
    explorer.choose(num_anchors=3, packed=True, seed=5)
    explorers.require_same_view(explorer, **names)
    assert explorer.code == panel(explorer).state["code"]
    assert explorer.code.startswith("lab.explore_masks(chats=chats, tokenizer=tokenizer, ")
    explorer.choose(shuffled=True, compare="seed 2", window=9)
    explorers.require_same_view(explorer, **names)
    explorer = explorers.anchors(like="specforge", packed=True)
    explorer.choose(block_size=2, per="document", row_length=65)
    explorers.require_same_view(explorer, **names)
    # What is compared with may be an object, which only its own name can say.
    row = one_row([encode(CHATS[0], TOKENIZER)], LENGTHS[0], TOKENIZER.eos_token_id)
    names["compare"] = draw_blocks(row, 2, 3, seed=4)
    explorer = explorers.masks(compare=names["compare"])
    assert "compare=compare" in explorer.code and explorer.settings["compare"] == "yours"
    explorers.require_same_view(explorer, **names)
    explorer.choose(compare="nothing")
    explorers.require_same_view(explorer, **names)
    # A control that no argument names is set by a line of its own.
    other, _ = counting()
    other.name, other.controls["number"].argument = "explore_masks", False
    other.controls["number"].value = 5
    assert other.code.splitlines()[1] == "explorer.controls['number'].value = 5"


def test_pictures_tables_and_pages_are_written_whole_and_sent_to_the_browser(tmp_path, monkeypatch):
    explorer, _ = counting()
    sent: list[tuple[dict, list]] = []
    monkeypatch.setattr(panel(explorer), "send", lambda *message: sent.append(message))
    explorer.save_picture(tmp_path / "a.png")
    explorer.save_picture(tmp_path / "a.svg")
    explorer.save_table(tmp_path / "a.csv")
    explorer.save_table(str(tmp_path / "b.csv"), "more")
    explorer.save_html(tmp_path / "a.html")
    assert (tmp_path / "a.png").read_bytes() == explorer._frame.png
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert pd.read_csv(tmp_path / "a.csv").to_dict("records") == [START]
    assert pd.read_csv(tmp_path / "b.csv")["x"].tolist() == [1, 2]
    explorer._act({"action": "tables"})
    assert sent.pop() == ({"tables": ["settings", "more"]},)
    for what, table, name in (
        ("png", None, "a.png"),
        ("svg", None, "a.svg"),
        ("html", None, "a.html"),
        ("csv", "settings", "a.csv"),
        ("csv", "more", "b.csv"),
    ):
        explorer._act({"action": "save", "what": what, "table": table})
        message, [content] = sent.pop()
        assert message["name"].endswith(f".{what}") and message["type"]
        assert content == (tmp_path / name).read_bytes()
    for call, wrong in (
        (explorer.save_picture, "a.jpg"),
        (explorer.save_table, "a.txt"),
        (explorer.save_html, "a.png"),
    ):
        with pytest.raises(ValueError, match=f"path must end in .*, got '{wrong}'"):
            call(wrong)
    with pytest.raises(ValueError, match=r"name must be one of \('settings', 'more'\), got 'x'"):
        explorer.save_table(tmp_path / "c.csv", "x")
    with pytest.raises(OSError):
        explorer.save_html(tmp_path / "nowhere" / "c.html")
    explorer.controls["number"].value = 13
    with pytest.raises(ValueError, match="counting has no picture: 13 is"):
        explorer.save_picture(tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.png", "a.svg", "a.csv", "b.csv", "a.html"]
    )


def test_a_page_needs_no_network_and_no_text_ends_its_script():
    class Probe(WidgetView):
        names = ("shared", "controls")

    text = "</script><!-- & é"
    shown = page("<title>", [Probe(state={"text": text, "bytes": b"\x00\xff"}), "<p>hi</p>"])
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", shown))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of SVG is no address"
    assert "default-src 'none'" in shown and " src=" not in shown and "<link" not in shown
    assert shown.count("</script") == 1 and "<!--" not in shown
    assert "&lt;title&gt;" in shown and "<p>hi</p>" in shown and '"base64": "AP8="' in shown


def test_a_module_is_its_files_one_behind_the_other():
    assert module("shared", "controls").startswith(module("shared"))
    assert module("shared", "controls").endswith(module("controls"))
    assert re.findall(r"^(?:import|export) .*$", module("shared", "controls"), re.M) == [
        "export default { render };"
    ]


def growing_stops(low: int, high: int) -> list[int]:
    """Each number up to 16, then eight of each doubling; the ends, whatever they are."""
    stops = {low, high} | set(range(low, min(high, 16)))
    for power in range(4, 40):
        stops |= {number for number in range(2**power, 2 ** (power + 1), 2 ** (power - 3))}
    return sorted(stop for stop in stops if low <= stop <= high)


@needs_node
def test_a_wide_slider_stops_at_numbers_that_grow_and_any_number_has_a_place_between():
    program = module("shared", "controls").removesuffix("export default { render };\n")
    program += """
        const answer = ([low, high, values]) => {
          const scale = scaleOf({ kind: "whole", growing: true, low, high });
          const stops = [...Array(scale.high + 1).keys()].map(scale.value);
          const places = values.map(scale.position);
          return [stops, places, values.map(scale.step), [0.4, -5, 1e9].map(scale.typed)];
        };
        const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
        process.stdout.write(JSON.stringify(cases.map(answer)));
    """
    ranges = [(1, 4096), (64, 131072), (0, 4096), (8, 131072), (100, 5000), (3, 3), (1, 10)]
    parts = (1, 2, 9, 77, 10**9)
    cases = [(a, b, sorted({b, *(a + (b - a) // part for part in parts)})) for a, b in ranges]
    done = subprocess.run(
        ["node", "-e", program], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    for (low, high, values), (stops, places, steps, typed) in zip(
        cases, json.loads(done.stdout), strict=True
    ):
        assert stops == growing_stops(low, high)
        assert len(stops) < 120, "the arrow keys pass through all of it"
        for value, place, step in zip(values, places, steps, strict=True):
            below, above = stops[math.floor(place)], stops[math.ceil(place)]
            assert below <= value <= above and (below == above or below < value < above)
            assert step == (1 if value in stops else "any")
        assert places == sorted(places) and typed == [low, low, high]


def slow(draw: Any, **options: Any) -> Explorer:
    """A slow explorer of one number."""

    def controls(progress: Progress) -> list:
        return [slider("number", 0, 0, 100)]

    return Explorer("slow", controls, draw, slow=True, **options)


def shown_number(chosen: SimpleNamespace) -> Frame:
    return Frame({"one": pd.DataFrame({"number": [chosen.number]})}, some_figure)


def test_a_slow_explorer_is_there_before_its_work_is_done_and_its_tables_wait():
    may_go_on, told = threading.Event(), threading.Event()

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        progress(3, 10, "counting one")
        told.set()
        assert may_go_on.wait(60)
        return shown_number(chosen)

    explorer = slow(draw)
    assert told.wait(60) and explorer.frames_drawn == 0
    counts = {"done": 3, "total": 10, "words": "counting one", "counts": "3 of 10 (30 %)"}
    assert panel(explorer).progress == counts
    assert repr(explorer) == "slow()"
    may_go_on.set()
    assert explorer.table["number"].tolist() == [0] and explorer.frames_drawn == 1
    assert panel(explorer).progress == {}
    assert b64decode(explorer._repr_mimebundle_()["image/png"]) == explorer._frame.png


def test_the_newest_value_wins_over_work_that_goes_on():
    begun, may_go_on, finished = threading.Event(), threading.Event(), []

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        if chosen.number == 1:
            begun.set()
            assert may_go_on.wait(60)
        progress(1, 2, "half")
        finished.append(chosen.number)
        return shown_number(chosen)

    explorer = slow(draw)
    explorer.controls["number"].value = 1
    assert begun.wait(60)
    for number in (2, 3):
        explorer.controls["number"].value = number
    may_go_on.set()
    assert explorer.table["number"].tolist() == [3]
    assert finished[-1] == 3 and 1 not in finished and explorer._problem == ""


def test_cancel_keeps_the_last_picture_says_so_and_it_can_go_on():
    begun = threading.Event()

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        while chosen.number == 1:
            progress(0, 0, "for ever")
            begun.set()
        return shown_number(chosen)

    explorer = slow(draw)
    before = picture(explorer).value
    explorer.controls["number"].value = 1
    assert begun.wait(60)
    explorer._act({"action": "cancel"})
    assert alert(explorer) == "Cancelled. Go on with a change of a control, or try again."
    assert panel(explorer).state["again"] and picture(explorer).value == before
    assert panel(explorer).progress == {}
    begun.clear()
    explorer._act({"action": "again"})
    assert begun.wait(60)
    explorer.controls["number"].value = 2
    assert explorer.table["number"].tolist() == [2] and not panel(explorer).state["again"]


def test_a_display_is_there_at_once_and_is_given_its_picture_when_it_is_drawn(monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()

    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        begun.set()
        assert may_go_on.wait(60)
        return shown_number(chosen)

    published = []

    def display(bundle: dict, **options: Any) -> Any:
        published.append(bundle)
        may_go_on.set()
        return SimpleNamespace(update=lambda bundle, raw: published.append(bundle))

    monkeypatch.setattr("IPython.display.display", display)
    explorer = slow(draw)
    explorer._ipython_display_()
    first, last = published
    assert first["text/plain"] == last["text/plain"] == "slow()"
    assert first[explorers.WIDGET] == last[explorers.WIDGET]
    assert "image/png" not in first and b64decode(last["image/png"]) == explorer._frame.png
    # Once it is drawn, it is shown as anything else is.
    with pytest.raises(NotImplementedError):
        explorer._ipython_display_()


def test_what_goes_wrong_in_the_work_is_a_sentence_or_raised_where_it_is_waited_for():
    def draw(chosen: SimpleNamespace, progress: Progress) -> Frame:
        if chosen.number == 0:
            raise OSError("no such file")
        raise ZeroDivisionError("a fault")

    explorer = slow(draw)
    assert alert(explorer) == "no such file"
    explorer.controls["number"].value = 1
    with pytest.raises(ZeroDivisionError, match="a fault"):
        explorer.tables  # noqa: B018

    def broken(progress: Progress) -> list:
        raise ValueError("no models")

    explorer = Explorer("slow", broken, draw, slow=True)
    with pytest.raises(ValueError, match="slow has no controls: no models"):
        explorer.controls  # noqa: B018


def test_a_small_model_has_one_thread_and_the_others_are_put_back():
    torch.set_num_threads(2)
    try:
        small = torch.nn.Linear(2, 2)
        with threads_for(small), threads_for(small):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), threads_for(small):
            raise KeyError
        assert torch.get_num_threads() == 2
        with torch.device("meta"):
            large = torch.nn.Linear(10_000, 10_000)
        with threads_for(large):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("attributes", "routed"), [({}, None), ({"_reply_subshell_for": None}, "a subshell")]
)
def test_a_message_of_the_panel_goes_to_its_own_thread_where_the_kernel_can_be_asked(
    attributes, routed
):
    class Channel:
        """A comm that takes no attributes but its own, as another kernel's may not."""

        __slots__ = tuple(attributes)

    channel = Channel()
    for name, value in attributes.items():
        setattr(channel, name, value)
    answer_at_once(channel)
    if routed:
        assert channel._reply_subshell_for({"content": {}}, routed) == routed


@pytest.fixture
def without_anywidget(monkeypatch):
    """The explorer's modules, made where anywidget cannot be imported."""
    found = builtins.__import__

    def refuse(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "anywidget":
            raise ImportError(name)
        return found(name, *more)

    names = [f"dspark_lab.explore.{name}" for name in ("widget", "controls", "explorer")]
    kept = {name: sys.modules[name] for name in names}
    package = sys.modules["dspark_lab.explore"]
    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in names:
        del sys.modules[name]
    yield importlib.import_module(names[-1])
    sys.modules.update(kept)
    for name, held in kept.items():
        setattr(package, name.rpartition(".")[2], held)


def test_without_anywidget_there_are_plain_controls_and_the_picture(without_anywidget):
    made = sys.modules["dspark_lab.explore.controls"]
    controls = [made.slider("number", 3, 0, 100), made.dropdown("kind", "a", ("a", "b"))]
    controls += [made.checkbox("on", True), made.selection_slider("size", 8, (4, 8))]

    def draw(chosen: SimpleNamespace) -> Any:
        if chosen.number == 13:
            raise ValueError("13 is unlucky")
        frame = without_anywidget.Frame
        return frame({"one": pd.DataFrame([vars(chosen)])}, some_figure, html=str(chosen.number))

    explorer = without_anywidget.Explorer("plain", controls, draw)
    box, status, shown = explorer.children
    number, kind, on, size = box.children
    assert [type(one).__name__ for one in box.children] == [
        *("IntSlider", "Dropdown", "Checkbox", "SelectionSlider")
    ]
    number.value, kind.value, on.value, size.value = 7, "b", False, 4
    assert explorer.settings == {"number": 7, "kind": "b", "on": False, "size": 4}
    assert explorer.table["number"].tolist() == [7] and shown.value.endswith(">7")
    explorer.controls["number"].value = 13
    assert number.value == 13 and shown.value.endswith(">7")
    assert status.value == '<p role="alert">13 is unlucky</p>'
    assert b64decode(explorer._repr_mimebundle_().get("image/png", "")) == b""
    explorer.reset()
    assert b64decode(explorer._repr_mimebundle_()["image/png"]).startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_anywidget_every_explorer_has_plain_controls_its_tables_and_its_picture():
    program = """
        import sys
        sys.modules["anywidget"] = None
        import dspark_lab as lab
        small = {"explore_acceptance": {"max_new_tokens": 4, "prompts": ["What is 2 + 3?"]}}
        small["explore_decoding"] = small["explore_acceptance"]
        small["explore_serving"] = {"requests_simulated": 2}
        for name in (name for name in lab.__all__ if name.startswith("explore_")):
            explorer = getattr(lab, name)(**small.get(name, {}))
            assert explorer.tables, name
            controls, status, shown = explorer.children
            assert len(controls.children) == len(explorer.controls) >= 2, name
            assert status.value == "" and shown.value.startswith(("<img ", "<div", "<span")), name
            bundle = explorer._repr_mimebundle_()
            assert len(bundle["image/png"]) > 1000, name
            print(name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [n for n in lab.__all__ if n.startswith("explore_")]


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
