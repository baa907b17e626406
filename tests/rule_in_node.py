"""The rule in JavaScript, asked in node about random masks, beside what the dense masks say."""

import json
import random
import shutil
import subprocess
from base64 import b64encode
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dspark_lab import explore
from dspark_lab.attention import View, training_dense_mask
from dspark_lab.blocks import Blocks
from dspark_lab.explore import PAIR_KINDS, MaskSpans, RuleMask, mask_state
from dspark_lab.explore.mask_geometry import PRESETS, difference_spans, other_mask
from tests.node import REVIVED

RULE = Path(explore.__file__).with_name("js") / "rule.js"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")

# Asks about each case of the standard input, a list, and answers with a list.
_DRIVER = (
    REVIVED
    + """
const by = (rows, columns, call) =>
  Array.from({ length: rows }, (_, i) => Array.from({ length: columns }, (_, j) => call(i, j)));
const answer = (given) => {
  const state = readState(revived(given.state), revived(given.state.row));
  const { mask, other } = state;
  const pairs = (call) => by(mask.queries, mask.keys, call);
  const found = { facts: given.cells.map(([query, key]) => cellFacts(state, query, key)) };
  found.lines = found.facts.map((facts) => factLines(facts));
  if (given.facts) return found;
  found.visible = pairs((query, key) => Number(sees(mask, query, key)));
  found.kinds = pairs((query, key) => kindOf(mask, query, key));
  found.why = pairs((query, key) => why(mask, query, key));
  found.regions = pairs((query, key) => regionOf(mask, query, key));
  found.counts = countRegions(mask);
  found.rectangles = Array.from(rectangles(mask));
  found.tiles = given.sizes.map((size) =>
    by(Math.ceil(mask.queries / size), Math.ceil(mask.keys / size),
      (row, column) => tileState(mask, size, row, column)));
  found.tileCounts = given.sizes.map((size) => countTiles(mask, size));
  if (other) {
    found.otherWhy = pairs((query, key) => why(other, query, key));
    const differences = differenceRectangles(mask, other);
    found.differences = Array.from(differences);
    found.differenceCounts = countDifferences(mask, differences);
    found.next = pairs((query, key) => nextDifference(differences, query, key));
    found.before = pairs((query, key) => nextDifference(differences, query, key, true));
  }
  return found;
};
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map(answer)));
"""
)


class Case(NamedTuple):
    """A mask and another, their dense masks, and the sizes of tiles to ask about."""

    mask: RuleMask
    dense: np.ndarray
    other: RuleMask
    other_dense: np.ndarray
    sizes: list[int]


def ask(questions: list[dict[str, Any]], source: str | None = None) -> list[dict[str, Any]]:
    """The answers of ``source``, ``rule.js`` where None."""
    source = RULE.read_text(encoding="utf-8") if source is None else source
    # A program's length as an argument has a limit, a file's has none.
    program = source + _DRIVER
    given = json.dumps(questions, default=lambda v: {"base64": b64encode(v).decode("ascii")})
    command = ["node", "-e", program]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def dense_of(blocks: Blocks, view: View, docs: torch.Tensor | None) -> np.ndarray:
    where = blocks.anchor_positions, blocks.block_keep_mask
    sizes: dict[str, Any] = {"seq_len": blocks.seq_len, "block_size": blocks.block_size}
    sizes |= {"window": view.window, "causal": view.causal, "doc_ids": docs}
    return training_dense_mask(*where, **sizes)[0].numpy()


def make_case(seed: int) -> Case:
    """Anchors in any order, packed or not, with dummies, a window, causal blocks, either layout."""
    luck = random.Random(seed)
    seq_len, count, size = luck.randint(2, 24), luck.randint(1, 5), luck.randint(2, 5)
    docs = torch.tensor([sorted(luck.choices(range(luck.randint(1, 4)), k=seq_len))])
    layout: Any = luck.choice(["anchor_predicts", "anchor_given"])

    def drawn() -> Blocks:
        keep = [luck.random() < 0.75 for _ in range(count)]
        anchors = [luck.randrange(seq_len) if kept else 0 for kept in keep]
        where = torch.tensor([anchors]), torch.tensor([keep])
        sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": size, "doc_ids": docs}
        return Blocks.of(*where, layout=layout, **sizes)

    view = View(luck.choice([None, None, luck.randint(1, seq_len)]), luck.random() < 0.3)
    blocks = drawn()
    dense = dense_of(blocks, view, docs)
    length = luck.choice([None, int((docs[0] < docs[0, -1]).sum())])
    anchored = blocks.anchor_positions[0][blocks.block_keep_mask[0]].tolist()
    if length is not None and (length == 0 or max(anchored, default=0) >= length):
        length = None  # anchors stand in the text
    mask = RuleMask(blocks, view, length=length)
    kind = luck.choice([*PRESETS, "anchors", "given"])
    if kind == "anchors":
        others = drawn()
        return Case(mask, dense, other_mask(mask, others), dense_of(others, view, docs), [1, 2, 3])
    if kind == "given":
        given = dense ^ (np.random.default_rng(seed).random(dense.shape) < 0.1)
        other = other_mask(mask, torch.from_numpy(given))
        return Case(mask, dense, other, given, [2, 5])
    other = other_mask(mask, kind)
    if kind == "context with the anchor":
        other_dense = dense.copy()
        for query, key in np.argwhere(~dense):
            block, slot = divmod(query, size)
            inside = view.window is None or slot < view.window
            if blocks.block_keep_mask[0, block] and inside:
                other_dense[query, key] |= bool(key == blocks.anchor_positions[0, block])
    else:
        other_dense = dense_of(blocks, other.view, None if kind == PRESETS[1] else docs)
    return Case(mask, dense, other, other_dense, [1, 4, 128])


def question(case: Case) -> dict[str, Any]:
    state = mask_state(case.mask, tile_size=case.sizes[0], other=case.other)
    return {"state": state, "cells": [[0, 0]], "sizes": case.sizes}


def kind_of(case: Case, query: int, key: int) -> str:
    """Why a pair is hidden or visible, by the first sentence that is true of it."""
    mask, blocks = case.mask, case.mask.blocks
    size, seq_len = blocks.block_size, blocks.seq_len
    block, slot = divmod(query, size)
    kept, anchor = bool(mask.keep[block]), int(mask.anchors[block])
    docs, length = blocks.doc_ids[0].tolist(), seq_len if mask.length is None else mask.length
    if key >= seq_len:
        if (key - seq_len) // size != block:
            return "another block"
        if mask.view.causal and key - seq_len > query:
            return "a later slot"
        return "own block" if kept else "dummy block"
    if not kept:
        return "a dummy's context"
    if key >= length:
        return "padding"
    if docs[key] != docs[anchor]:
        return "another document"
    if key >= anchor:
        return "the anchor itself" if key == anchor else "after the anchor"
    window = mask.view.window
    return (
        "context prefix"
        if window is None or anchor + slot - key < window
        else ("beyond the window")
    )


def tile_states_of(dense: np.ndarray, size: int) -> list[list[int]]:
    rows, columns = (range(0, n, size) for n in dense.shape)
    tiles = [[dense[i : i + size, j : j + size].sum() for j in columns] for i in rows]
    return [[2 if n == size * size else int(n > 0) for n in line] for line in tiles]


def painted(flat: list[int], shape: tuple[int, ...], default: int) -> np.ndarray:
    """Rectangles, [query, past, key, past, value] each, as a matrix; no two may overlap."""
    cells = np.full(shape, default)
    for query, past, key, past_key, value in np.reshape(flat, (-1, 5)):
        assert query < past and key < past_key
        assert (cells[query:past, key:past_key] == default).all(), "rectangles overlap"
        cells[query:past, key:past_key] = value
    return cells


def unlike(case: Case, found: dict[str, Any]) -> list[str]:
    """What JavaScript says of a case that plain loops over its pairs do not say."""
    mask, dense, wrong = case.mask, case.dense, list[str]()

    def check(what: str, right: bool) -> None:
        if not right:
            wrong.append(what)

    def same(what: str, got: Any, wanted: Any) -> None:
        check(what, np.array_equal(got, wanted))

    kinds = [[kind_of(case, q, k) for k in range(dense.shape[1])] for q in range(len(dense))]
    numbers = np.array([[PAIR_KINDS.index(kind) for kind in line] for line in kinds])
    same("visible", found["visible"], dense)
    same("kinds", found["kinds"], numbers)
    regions = explore.mask_regions(mask.blocks, view=mask.view).numpy()
    same("regions", found["regions"], regions)
    same("counts", found["counts"], np.bincount(regions.ravel(), minlength=4))
    same("rectangles", painted(found["rectangles"], dense.shape, 0), regions)
    for size, tiles, counts in zip(case.sizes, found["tiles"], found["tileCounts"], strict=True):
        right = tile_states_of(dense, size)
        same("tiles", tiles, right)
        same("tile counts", counts, np.bincount(np.ravel(right), minlength=3))
    size = mask.blocks.block_size
    for query, line in enumerate(found["why"]):
        for key, why in enumerate(line):
            check("why", why.startswith("visible: " if dense[query, key] else "hidden: "))
            said = case.other_dense[query, key], found["otherWhy"][query][key]
            check("other why", said[1].startswith("visible" if said[0] else "hidden"))
            kind, anchor = kinds[query][key], mask.anchors[query // size]
            if kind in ("context prefix", "after the anchor"):
                not_before = "is before" if kind == "context prefix" else "is not before"
                check("numbers", f"token {key} {not_before} the anchor {anchor}" in why)
            elif kind in ("another document", "another block", "padding"):
                check("words", why == f"hidden: {kind}")
            elif kind == "beyond the window":
                check("window", f"token {key} is {anchor + query % size - key} before" in why)
    side = np.where(dense == case.other_dense, -1, np.where(dense, 0, 1))
    same("differences", painted(found["differences"], dense.shape, -1), side)
    counted = found["differenceCounts"]
    by_kind = [np.bincount(numbers[side == i], minlength=len(PAIR_KINDS)) for i in (0, 1)]
    same("differences by kind", counted["kinds"], by_kind)
    same("only", counted["only"], [(side == i).sum() for i in (0, 1)])
    places = [(r[0], r[2]) for r in np.reshape(found["differences"], (-1, 5)).astype(int).tolist()]
    firsts = np.argwhere(side >= 0)
    first = counted["first"]
    same("first", firsts[:1].ravel(), [] if first is None else [first["query"], first["key"]])
    for query, key in np.ndindex(*dense.shape):
        later = [place for place in places if place > (query, key)] or places
        earlier = [place for place in places if place < (query, key)] or places
        for name, wanted in (("next", later[:1]), ("before", earlier[-1:])):
            got = found[name][query][key]
            check(name, wanted == ([] if got is None else [(got["query"], got["key"])]))
    return wrong


def unlike_in_python(case: Case) -> list[str]:
    """The same for the intervals in Python, which the tables and the picture are made of."""
    mask, dense = case.mask, case.dense
    regions = explore.mask_regions(mask.blocks, view=mask.view).numpy()
    wrong = [] if np.array_equal(filled(mask.regions, 0), regions) else ["regions"]
    wrong += (
        [] if np.array_equal(filled(case.other.regions, 0) > 0, case.other_dense) else ["other"]
    )
    for size in case.sizes:
        if not np.array_equal(filled(mask.tiles(size), 0), tile_states_of(dense, size)):
            wrong.append(f"tiles of {size}")
    side = np.where(dense == case.other_dense, -1, np.where(dense, 0, 1))
    if not np.array_equal(filled(difference_spans(mask, case.other), -1), side):
        wrong.append("difference")
    table = explore.count_differences(mask, case.other)
    lines = []
    for i, name in enumerate((mask.name, case.other.name)):
        found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in PAIR_KINDS}
        for query, key in np.argwhere(side == i).tolist():
            found[kind_of(case, query, key)].append((query, key))
        for kind, pairs in found.items():
            if pairs:
                block, slot = divmod(pairs[0][0], mask.blocks.block_size)
                lines.append([name, kind, len(pairs), block, slot, pairs[0][1]])
    return wrong + ([] if table.values.tolist() == lines else ["difference table"])


def filled(spans: MaskSpans, default: int) -> np.ndarray:
    rows = np.stack([spans.row, spans.row + 1, spans.start, spans.end, spans.value], axis=1)
    return painted(rows.ravel().tolist(), spans.shape, default)
