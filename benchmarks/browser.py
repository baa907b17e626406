"""What a person waits for in Chromium: zooming, a slider's move, a fast drag, scrolling.

Beside each figure stands the old way: matplotlib draws a PNG in the kernel, an <img> shows it.
Chromium draws in software here, without a limit on frames where their own time is asked for.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import seconds
from dspark_lab.explore import Explorer, explore_anchors, explore_masks
from tests import browsers
from tests.browsers import FLAGS, Lab, new_page, started_browser, started_lab, write_notebook

# Frames as fast as they can be made, so that the time between two is what one costs.
UNLIMITED = [*FLAGS, "--disable-frame-rate-limit", "--disable-gpu-vsync"]
FRAMES, MOVES, OLD_MOVES, DRAG_STEPS = 200, 41, 9, 400


def _packed(tokens: int, num_anchors: int, block_size: int) -> dict[str, Any]:
    """The arguments of an explorer of one packed row of whole conversations."""
    sizes = {"row_length": tokens, "num_anchors": num_anchors, "block_size": block_size}
    return sizes | {"packed": True}


ZOOMED = _packed(65_536, 1536, 16) | {"context": 65_536}
MOVED = _packed(4096, 512, 7) | {"context": 4096}
SCROLLED = _packed(131_072, 1536, 7)

# Wheel and drag in turn, one for each frame; the time from one frame to the next, in ms.
ZOOM_AND_PAN = """async ([canvas, frames]) => {
  const box = canvas.getBoundingClientRect();
  const middle = [box.x + box.width * 0.45, box.y + box.height * 0.55];
  const at = (name, more, shift = 0) => ({
    bubbles: true, cancelable: true, clientX: middle[0] + shift, clientY: middle[1] + shift,
    pointerId: 1, button: 0, buttons: 1, isPrimary: true, ...more,
  });
  canvas.setPointerCapture = () => {};
  canvas.releasePointerCapture = () => {};
  const times = [];
  let last = 0;
  for (let i = 0; i < frames; i++) {
    const now = await new Promise(requestAnimationFrame);
    if (i > 2) times.push(now - last);
    last = now;
    const phase = i % 50;
    if (phase < 30) {
      const deltaY = i % 100 < 50 ? -40 : 40;
      canvas.dispatchEvent(new WheelEvent("wheel", at("wheel", { deltaY })));
    } else {
      const kind = phase === 30 ? "pointerdown" : phase === 49 ? "pointerup" : "pointermove";
      canvas.dispatchEvent(new PointerEvent(kind, at(kind, {}, 3 * (phase - 30))));
    }
  }
  return times;
}"""

# Scrolls whatever scrolls under an element, some lines a frame and now and then far.
SCROLL = """async ([root, frames]) => {
  const scrolls = (el) => el.scrollHeight > el.clientHeight + 100
    && /auto|scroll/.test(getComputedStyle(el).overflowY);
  const box = [root, ...root.querySelectorAll("*")].find(scrolls);
  if (!box) throw new Error("nothing scrolls");
  const times = [];
  let last = 0;
  for (let i = 0; i < frames; i++) {
    const now = await new Promise(requestAnimationFrame);
    if (i > 2) times.push(now - last);
    last = now;
    box.scrollTop = i % 25 === 24 ? Math.random() * box.scrollHeight : box.scrollTop + 90;
  }
  return times;
}"""

# Notes when a key was pressed or a slider moved, and when what followed was on the screen.
WATCH = """output => {
  const seen = { moved: 0, painted: [], changed: 0, wake: null };
  window.seen = seen;
  const moved = (event) => { seen.moved = event.timeStamp; };
  for (const kind of ["keydown", "pointermove"]) document.addEventListener(kind, moved, true);
  const afterRendering = (call) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => call(performance.now());
    port2.postMessage(0);
  };
  const saw = (moved, now) => {
    seen.painted.push([moved, now]);
    seen.wake?.();
  };
  new MutationObserver((changes) => {
    if (changes.some((one) => one.attributeName === "data-frame")) {
      const moved = seen.moved;
      afterRendering((now) => saw(moved, now));
    }
    seen.changed = performance.now();
    const image = changes.some((one) => one.type === "childList" && one.target.closest?.(".old"))
      && output.querySelector(".old img");
    if (image) {
      const moved = seen.moved;
      image.decode().then(() => requestAnimationFrame(
        () => afterRendering((now) => saw(moved, now))));
    }
  }).observe(output, {
    subtree: true, childList: true, characterData: true, attributes: true,
    attributeFilter: ["data-frame"],
  });
}"""

# The explorer, and the old way of showing it.
CELLS = (
    f"""import time
from dspark_lab import explore_masks
explorer = explore_masks(**{MOVED})
explorer""",
    f"""import ipywidgets
inner = explore_masks(**{MOVED})
old = ipywidgets.IntSlider({MOVED["num_anchors"]}, 256, 1024, description="old way")
image = ipywidgets.HTML()
image.add_class("old")
def redraw(change):
    inner.controls["num_anchors"].value = change.new
    picture = inner._repr_mimebundle_()["image/png"]
    image.value = f'<img alt="" src="data:image/png;base64,{{picture}}">'
old.observe(redraw, "value")
ipywidgets.VBox([old, image])""",
)


def run() -> Iterator[str]:
    if browsers.find_browser() is None:
        yield "no Chromium or Chrome is installed"
        return
    with tempfile.TemporaryDirectory() as folder, started_browser(UNLIMITED) as browser:
        yield f"Chromium {browser.version}, drawing in software"
        masks = explore_masks(**ZOOMED)
        page = _saved(browser, masks, Path(folder) / "mask.html")
        canvas = page.locator("canvas[role=application]").first
        times = page.evaluate(ZOOM_AND_PAN, [canvas.element_handle(), FRAMES])
        yield _line(f"zoom and pan, {_sizes(ZOOMED)}, a frame", times, "at most 16")

        def drawn() -> None:
            masks.redraw()
            _ = masks._frame.png

        old = [seconds(drawn) * 1e3 for _ in range(3)]
        yield _line("    the old way, a PNG of it", old)
        anchors = explore_anchors(**SCROLLED)
        page = _saved(browser, anchors, Path(folder) / "tokens.html")
        times = page.evaluate(SCROLL, [page.locator("body").element_handle(), FRAMES])
        yield _line(f"scrolling, {_sizes(SCROLLED)}, a frame", times, "none over 33")
    with tempfile.TemporaryDirectory() as folder, started_browser() as browser:
        yield from _in_a_notebook(browser, Path(folder))


def _saved(browser: Any, explorer: Explorer, path: Path) -> Any:
    """A page with an explorer, opened without a kernel."""
    explorer.save_html(path)
    page = new_page(browser)
    page.goto(path.as_uri())
    page.locator("[data-frame]").first.wait_for()
    return page


def _in_a_notebook(browser: Any, folder: Path) -> Iterator[str]:
    write_notebook(folder / "notebooks" / "try.ipynb", *CELLS)
    with started_lab(folder) as lab:
        page = new_page(browser)
        lab.open(page, "try.ipynb")
        lab.run_all(page, len(CELLS))
        new, old = (page.locator(".jp-OutputArea-output").nth(i) for i in (0, 1))
        new.locator("[data-frame]").first.wait_for()
        slider = new.get_by_role("slider", name="num_anchors").first
        yield _line(
            f"a slider's move to the canvas, {_sizes(MOVED)}",
            _moves(page, new, slider, MOVES),
            "median at most 50, 95th percentile 100",
        )
        yield from _dragged(page, lab, new, slider)
        handle = old.get_by_role("slider").first
        yield _line("    the old way, to the <img>", _moves(page, old, handle, OLD_MOVES))


def _moves(page: Any, output: Any, slider: Any, moves: int) -> list[float]:
    """Milliseconds from a key on a slider to the picture, one move after the other."""
    output.evaluate(WATCH)
    slider.focus()
    times = []
    for move in range(moves):
        page.evaluate("seen.painted.length = 0")
        page.keyboard.press("ArrowLeft" if move % 20 < 10 else "ArrowRight")
        # To look in each frame whether it is there would make frames.
        page.evaluate("new Promise(done => { if (seen.painted.length) done(); seen.wake = done; })")
        begin, end = page.evaluate("seen.painted[0]")
        times.append(end - begin)
    return times


def _dragged(page: Any, lab: Lab, output: Any, slider: Any) -> Iterator[str]:
    """Frames while a slider is dragged to and fro, and how long after the last all is there."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, height)
    page.mouse.down()
    page.evaluate("seen.painted.length = 0")
    for step in range(DRAG_STEPS):
        share = 0.2 + 0.6 * abs(step % 100 - 50) / 50
        page.mouse.move(box["x"] + box["width"] * share, height)
    page.mouse.up()
    value = int(slider.get_attribute("aria-valuetext"))
    page.wait_for_function("performance.now() - seen.changed > 1000")
    painted = page.evaluate("seen.painted")
    moved, changed = page.evaluate("[seen.moved, seen.changed]")
    during = [end for _, end in painted if end <= moved]
    gaps = [later - end for end, later in zip(during, during[1:], strict=False)]
    rate = 1000 * len(gaps) / max(1e-9, sum(gaps))
    said = lab.python(
        "begin = time.perf_counter(); shown = len(explorer.tables['blocks']);"
        "print(explorer.controls['num_anchors'].value, 1000 * (time.perf_counter() - begin))"
    )
    ended, tables = said.split()
    yield f"a fast drag: {rate:.0f} frames a second (at least 20), ends on the last value: " + (
        "yes" if int(ended) == value else f"NO, {ended} for {value}"
    )
    yield (
        f"    from the last move to the last change on the page {changed - moved:.0f} ms, "
        f"and the tables after {float(tables):.0f} ms more (together at most 300)"
    )


def _sizes(settings: dict[str, Any]) -> str:
    names = {"S": "row_length", "N": "num_anchors", "K": "block_size"}
    return ", ".join(f"{sign} {settings[name]:,}" for sign, name in names.items())


def _line(name: str, times: Sequence[float], aim: str = "") -> str:
    ordered = sorted(times)
    late = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return (
        f"{name}: median {statistics.median(times):.1f} ms, 95th percentile {late:.1f}, "
        f"{ordered[0]:.1f} to {ordered[-1]:.1f} over {len(times)}" + (f" ({aim})" if aim else "")
    )
