"""The functions of ``tokens.js`` that need no page, asked in node."""

import json
import subprocess
from base64 import b64encode
from typing import Any

from dspark_lab.explore.widget import module
from tests.node import REVIVED

_DRIVER = (
    REVIVED
    + """
const answer = (given) => {
  const { row, ...state } = revived(given.state);
  const text = readDraw(state, readRow(row));
  const tokens = [...Array(text.length).keys()];
  const lines = breakLines(text, given.columns, (part) => part.replaceAll("\\n", "").length);
  return {
    shown: text.shown, lines: [...lines], lineOf: tokens.map((token) => lineOf(lines, token)),
    parts: [...Array(lines.length / 2).keys()].map((line) => partsOf(text, lines, line)),
    covering: tokens.map((token) => coveringBlocks(text, token)),
    documents: tokens.map((token) => documentOf(text, token)),
    facts: tokens.map((token) => tokenFacts(text, token)),
    blocks: text.kept.map((block) => blockFacts(text, block)),
    lists: Object.fromEntries(TOKEN_LISTS.map((list) => [list, listTokens(text, list)])),
    found: given.wanted.map((wanted) => [...findText(text, wanted)]),
    next: Object.fromEntries(Object.keys(TOKEN_KINDS).map(
      (kind) => [kind, [-1, ...tokens].map((from) => nextOfKind(text, kind, from))])),
    map: [...mapColumns(text, given.parts)],
  };
};
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map(answer)));
"""
)


def ask(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``tokens.js`` answers about states, as ``token_state`` makes them, each with its row."""
    source = module("shared", "tokens")
    given = json.dumps(questions, default=lambda v: {"base64": b64encode(v).decode("ascii")})
    command = ["node", "-e", source + _DRIVER]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
