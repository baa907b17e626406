// The text of a row under a draw of blocks: lines, what covers each token, search, lists, a map.
//
// Pure functions without a page; tokens_view.js shows what they find.

const TOKEN_STATES = ["prompt", "not covered", "covered", "never a label", "padding"];
const STATE_WORDS = [
  "part of the prompt: never supervised",
  "supervised, but not covered by this draw",
  "covered by this draw",
  "never a label: supervised, but no anchor can stand before it",
  "padding",
];
const [PROMPT, NOT_COVERED, COVERED, NEVER, PADDING] = TOKEN_STATES.keys();
const TOKEN_LISTS = ["worst covered", "never a label", "longest gap"];
const MOST_LISTED = 200;
// Names of kinds that the legend counts, and which tokens they are.
const TOKEN_KINDS = {
  prompt: (text, i) => text.states[i] === PROMPT,
  covered: (text, i) => text.states[i] === COVERED,
  "not covered": (text, i) => text.states[i] === NOT_COVERED,
  "never a label": (text, i) => text.states[i] === NEVER,
  candidate: (text, i) => text.candidates[i] === 1,
  anchor: (text, i) => text.blockAt.has(i),
};

// How a line that parts documents is told from one that begins in the middle of a token.
const DIVIDER = -1;

// A row's tokens, as Python sent them, once for each row.
function readRow(row) {
  const ends = new Int32Array(row.texts.length);
  let end = 0;
  row.texts.forEach((text, i) => { ends[i] = end += text.length; });
  return {
    texts: row.texts, ends, joined: row.texts.join(""), shown: row.texts.map(shownText),
    ids: values(row.ids, Int32Array), documents: values(row.documents, Int32Array),
    length: row.length,
  };
}

// A draw on a row, as Python sent it.
function readDraw(state, row) {
  const [anchors, keep] = [values(state.anchors, Int32Array), values(state.keep, Uint8Array)];
  const kept = [...anchors.keys()].filter((block) => keep[block]);
  kept.sort((a, b) => anchors[a] - anchors[b]);
  return {
    ...row, name: state.name, predicted: state.predicted, blockSize: state.block_size,
    anchors, kept, blockAt: new Map(kept.map((block) => [anchors[block], block])),
    supervised: values(state.supervised, Int32Array), states: values(state.states, Uint8Array),
    candidates: values(state.candidates, Uint8Array), times: values(state.times, Int32Array),
    chances: values(state.chances, Float32Array),
  };
}

// A token's text with signs for what has no shape; "⏎" and "\n" stand for the end of a line.
function shownText(text) {
  if (/^[!-~ ]+$/.test(text)) return text;
  if (!text) return "·";
  return text.replaceAll("\t", "⇥").replaceAll("\n", "⏎\n")
    .replace(/(?!\n)[\p{Cc}\p{Zl}\p{Zp}]/gu, "·");
}

// Where lines begin, as [token, character of its shown text] one behind the other; a divider's
// character is DIVIDER. `cells(text)` is how many columns a text takes.
function breakLines(text, columns, cells) {
  const lines = [];
  const documents = new Set(text.documents.length > 1 ? text.documents : []);
  let [column, fresh] = [0, true];
  // The last place in the line where words part.
  let [gap, gapColumn] = [-1, 0];
  const begin = (token, character = 0) => {
    lines.push(token, character);
    [column, fresh, gap] = [0, false, -1];
  };
  for (let token = 0; token < text.length; token++) {
    const shown = text.shown[token];
    if (documents.has(token)) {
      lines.push(token, DIVIDER);
      fresh = true;
    }
    if (fresh) begin(token);
    const wide = cells(shown);
    if (shown.includes("\n") || wide > columns) {
      let at = 0;
      for (const sign of shown) {
        if (sign === "\n") fresh = true;
        else {
          const size = cells(sign);
          if (fresh || column + size > columns) begin(token, at);
          column += size;
        }
        at += sign.length;
      }
      gap = -1;
      continue;
    }
    if (shown[0] === " " && column) [gap, gapColumn] = [token, column];
    if (column + wide > columns) {
      // The word that no longer fits begins the next line, unless it is as long as a line.
      const [from, before] = [gap, column - gapColumn];
      if (from >= 0 && from < token && before + wide <= columns) {
        begin(from);
        column = before;
      } else begin(token);
    }
    column += wide;
  }
  return Int32Array.from(lines);
}

// The line in which a token begins.
function lineOf(lines, token) {
  let [low, high] = [0, lines.length / 2];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    const [first, character] = [lines[2 * middle], lines[2 * middle + 1]];
    if (first < token || (first === token && character <= 0)) low = middle;
    else high = middle;
  }
  return low;
}

// The parts of tokens in a line, as [token, text].
function partsOf(text, lines, line) {
  const [first, from] = [lines[2 * line], lines[2 * line + 1]];
  if (from === DIVIDER) return [];
  const last = line + 1 < lines.length / 2;
  const [end, to] = last ? [lines[2 * line + 2], lines[2 * line + 3]] : [text.length, 0];
  const parts = [];
  for (let token = first; token < end + (to > 0 ? 1 : 0); token++) {
    const begin = token === first ? from : 0;
    const part = text.shown[token].slice(begin, token === end ? to : undefined);
    if (part) parts.push([token, part.replaceAll("\n", "")]);
  }
  return parts;
}

// The document that a token belongs to.
function documentOf(text, token) {
  let document = 0;
  while (document + 1 < text.documents.length && text.documents[document + 1] <= token) document++;
  return document;
}

// How many labels of a block lie in the row.
function labelsOf(text, block) {
  return Math.min(text.predicted, text.texts.length - 1 - text.anchors[block]);
}

// The blocks that cover a token, in the order of their anchors, and with which slot.
function coveringBlocks(text, token) {
  let [low, high] = [0, text.kept.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (text.anchors[text.kept[middle]] < token - text.predicted) low = middle + 1;
    else high = middle;
  }
  const found = [];
  for (; low < text.kept.length && text.anchors[text.kept[low]] < token; low++) {
    const block = text.kept[low];
    const label = token - text.anchors[block] - 1;
    if (label < text.supervised[block]) {
      found.push({ block, slot: label + text.blockSize - text.predicted });
    }
  }
  return found;
}

// The tokens that each occurrence of a text touches, as [first, last] one behind the other.
function findText(text, wanted) {
  const found = [];
  if (!wanted) return found;
  const search = new RegExp(wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
  let token = 0;
  const past = text.length ? text.ends[text.length - 1] : 0;
  for (const { 0: match, index } of text.joined.matchAll(search)) {
    if (index + match.length > past) break;
    while (text.ends[token] <= index) token++;
    let last = token;
    while (text.ends[last] < index + match.length) last++;
    found.push(token, last);
  }
  return found;
}

// At most MOST_LISTED places of a list, as Python's token_lists, and how many there are in all.
function listTokens(text, list) {
  const { states, chances } = text;
  let places = [];
  if (list === "longest gap") {
    // A gap never goes on in another document, whose first label has no anchor before it.
    for (let i = 0; i < text.length; i++) {
      if (states[i] !== NOT_COVERED) continue;
      if (i > 0 && states[i - 1] === NOT_COVERED) places.at(-1).tokens++;
      else places.push({ position: i, tokens: 1 });
    }
    places.sort((a, b) => b.tokens - a.tokens);
  } else {
    const never = list === "never a label";
    const belongs = (i) => (never ? states[i] === NEVER
      : states[i] === COVERED || states[i] === NOT_COVERED);
    const found = [];
    for (let i = 0; i < text.length; i++) if (belongs(i)) found.push(i);
    // Only the first are put in order: sorting a long row would take longer than a frame.
    const highest = never ? 0 : Float32Array.from(found, (i) => chances[i]).sort()[MOST_LISTED - 1];
    const first = never ? found : found.filter((i) => !(chances[i] > highest));
    if (!never) first.sort((a, b) => chances[a] - chances[b] || a - b);
    const listed = first.slice(0, MOST_LISTED).map((position) => ({ position, tokens: 1 }));
    return { places: listed, count: found.length };
  }
  return { places: places.slice(0, MOST_LISTED), count: places.length };
}

// The next token of a kind behind `from`, from the beginning again; -1 where there is none.
function nextOfKind(text, kind, from) {
  for (let step = 1; step <= text.length; step++) {
    const token = (from + step + text.length) % text.length;
    if (TOKEN_KINDS[kind](text, token)) return token;
  }
  return -1;
}

// How many tokens of each state lie in each of `columns` equal parts of the row, and its anchors.
function mapColumns(text, columns) {
  const counts = new Uint32Array(columns * TOKEN_STATES.length);
  for (let i = 0; i < text.length; i++) {
    const column = Math.floor((i * columns) / text.length);
    counts[column * TOKEN_STATES.length + text.states[i]]++;
  }
  return counts;
}

// What is said of a token, in short.
function tokenFacts(text, token) {
  const [state, block] = [text.states[token], text.blockAt.get(token)];
  const facts = [`${quoted(text.texts[token])} · position ${count(token)} · id ${text.ids[token]}`
    + (text.documents.length > 1 ? ` · document ${documentOf(text, token)}` : "")];
  facts.push(STATE_WORDS[state]);
  if (state !== PROMPT && state !== PADDING) {
    const times = text.times[token];
    facts.push(`supervised ${times === 1 ? "once" : `${times} times`} by this draw, `
      + `covered with probability ${text.chances[token].toFixed(3)}`);
  }
  if (block !== undefined) facts.push(`the anchor of block ${block}`);
  else if (text.candidates[token]) facts.push("can be an anchor");
  return facts;
}

// A block in words.
function blockFacts(text, block) {
  const anchor = text.anchors[block];
  const labels = labelsOf(text, block);
  const document = documentOf(text, anchor);
  const first = text.documents[document] ?? 0;
  const context = anchor > first
    ? `context ${count(first)} to ${count(anchor - 1)} (${plural(anchor - first, "token")})`
    : "no context";
  const supervised = text.supervised[block];
  const words = [];
  for (let label = 0; label < labels; label++) {
    const slot = label + text.blockSize - text.predicted;
    const mark = label < supervised ? "" : " (not supervised)";
    words.push(`${slot} ${quoted(text.texts[anchor + 1 + label])}${mark}`);
  }
  return [
    `Block ${block}: anchor ${count(anchor)} ${quoted(text.texts[anchor])}, ${context}`,
    `labels ${count(anchor + 1)} to ${count(anchor + labels)}, ${supervised} of `
      + `${text.predicted} supervised. By slot: ${words.join(", ")}`,
  ];
}

const quoted = (text) => `“${visible(text, 30)}”`;
const count = (number) => number.toLocaleString("en");
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

// How long two rows are the same from their beginning.
function sameTokens(one, other) {
  const shorter = Math.min(one.length, other.length);
  for (let i = 0; i < shorter; i++) if (one.texts[i] !== other.texts[i]) return i;
  return shorter;
}
