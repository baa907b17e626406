"""The panel of controls in Chromium, with a model that a test plays the kernel of."""

from typing import Any

import pytest

from dspark_lab.explore.controls import Panel, slider
from dspark_lab.explore.widget import module

pytestmark = pytest.mark.browser

LIVE = """([source, state]) => {
    const render = new Function(source.replace(/export default [^]*$/, "return render;"))();
    const held = { state, progress: {} }, calls = {};
    window.sent = [];
    window.answer = (turn) => {
        held.state = { ...held.state, turn };
        calls["change:state"]();
    };
    const model = {
        get: (name) => held[name], set() {}, save_changes() {}, off() {},
        send: (message) => sent.push(message), on: (event, call) => { calls[event] = call; },
    };
    render({ model, el: document.querySelector(".widget") });
}"""


def test_of_a_fast_drag_two_moves_are_on_their_way_and_the_last_arrives(open_page):
    page = open_page("<div class=widget></div>")
    state: dict[str, Any] = {"controls": [slider("number", 5, 0, 100).state()], "turn": 0}
    page.evaluate(LIVE, [module(*Panel.names), state])
    handle = page.get_by_role("slider", name="number").first

    def sent():
        return [
            (one["action"], one["turn"], one["values"]["number"]) for one in page.evaluate("sent")
        ]

    handle.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert sent() == [("set", 1, 6), ("set", 2, 7)]
    page.evaluate("answer(1)")
    assert sent()[2:] == [("set", 10, 15)]
    # An answer to an earlier move takes nothing back, and the last one was sent once.
    page.evaluate("answer(2)")
    assert handle.input_value() == "15" or handle.get_attribute("aria-valuetext") == "15"
    page.evaluate("answer(10)")
    assert len(sent()) == 3
    page.keyboard.press("ArrowRight")
    assert len(sent()) == 4
