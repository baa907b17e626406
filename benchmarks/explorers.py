"""How long an explorer takes from a slider's move to the new picture, in the kernel."""

import statistics
from collections.abc import Iterator
from itertools import cycle, islice

from benchmarks.measure import seconds
from dspark_lab.widgets import Explorer, explore_anchors, explore_masks

MOVES = 41


def run() -> Iterator[str]:
    yield _redraws(explore_anchors(num_anchors=64, block_size=16))
    yield _redraws(explore_masks(num_anchors=64, block_size=16))
    yield _redraws(explore_masks(num_anchors=6, block_size=3, context=24, tile_size=16))


def _redraws(explorer: Explorer) -> str:
    """Each move changes one control; the conversation changes too, so that S varies up to 512."""
    times = []
    anchors = explorer.controls["num_anchors"].value
    for move, value in enumerate(islice(cycle((anchors - 1, anchors, anchors - 2)), MOVES)):
        control = "conversation" if move % 4 == 3 else "num_anchors"
        explorer.controls["num_anchors"].value = anchors
        value = move if control == "conversation" else value - 3

        def turn(control=control, value=value):
            explorer.controls[control].value = value

        times.append(seconds(turn) * 1e3)
    times.sort()
    return (
        f"{explorer!r}\n    redraw: median {statistics.median(times):.0f} ms, "
        f"{times[0]:.0f} to {times[-1]:.0f} ms over {MOVES} moves"
    )
