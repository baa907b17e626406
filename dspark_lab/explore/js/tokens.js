// The text of a row under a draw of blocks: what covers each token, search, lists, a map.
//
// Only the lines in view are elements. Lines are broken once for each width and all equally high,
// so that where a line stands follows from its number, whatever the row's length.

const TOKEN_STATES = ["prompt", "not covered", "covered", "never a label", "padding"];
const STATE_WORDS = [
  "part of the prompt: never supervised",
  "supervised, but not covered by this draw",
  "covered by this draw",
  "never a label: supervised, but no anchor can stand before it",
  "padding",
];
const [PROMPT, NOT_COVERED, COVERED, NEVER, PADDING] = TOKEN_STATES.keys();
const STATE_COLOURS = ["faint", "notCovered", "covered", "never", "faint"];
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

const LINE_HEIGHT = 26;
// Lines beyond the view's edges that are there before they come into view.
const SPARE_LINES = 6;
// Columns of the number at a line's beginning.
const GUTTER = 8;
// How a line that parts documents is told from one that begins in the middle of a token.
const DIVIDER = -1;

// ---- The text, without a page

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
      if (column && wide > columns) begin(token);
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
    const documents = new Set(text.documents);
    for (let i = 0; i < text.length; i++) {
      if (states[i] !== NOT_COVERED) continue;
      const goes = i > 0 && states[i - 1] === NOT_COVERED && !documents.has(i);
      if (goes) places.at(-1).tokens++;
      else places.push({ position: i, tokens: 1 });
    }
    places.sort((a, b) => b.tokens - a.tokens);
  } else {
    const never = list === "never a label";
    const belongs = (i) => (never ? states[i] === NEVER
      : (states[i] === COVERED || states[i] === NOT_COVERED) && chances[i] > 0);
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

// ---- The widget

const TOKENS_STYLE = `
.dspark-tokens { position: relative; color: var(--ink); container-type: inline-size;
  font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif); }
.dspark-tokens button, .dspark-tokens input, .dspark-tokens select { font: inherit;
  color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 4px;
  padding: 2px 8px; min-height: 26px; box-sizing: border-box; }
.dspark-tokens button { cursor: pointer; }
.dspark-tokens :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.tokens-bar, .tokens-legend { display: flex; flex-wrap: wrap; gap: 6px; align-items: center;
  margin-bottom: 6px; }
.tokens-bar input { width: 15em; max-width: 40cqw; }
.tokens-bar output { min-width: 8em; color: var(--faint); font-variant-numeric: tabular-nums; }
.dspark-tokens .tokens-legend button { font-family: var(--jp-code-font-family, monospace);
  border: 0 solid transparent; background: none; font-variant-numeric: tabular-nums;
  font-size: 12px; }
.tokens-legend span { color: var(--faint); }
.dspark-tokens .tokens-legend button:disabled { cursor: default; opacity: 1; color: var(--faint); }
.dspark-tokens input::placeholder { color: var(--faint); opacity: 1; }
.tokens-map { position: relative; height: 46px; margin-bottom: 6px; cursor: pointer;
  touch-action: none; }
.tokens-view { position: absolute; top: 0; bottom: 0; left: 0; border: 2px solid var(--ink);
  border-radius: 3px; box-sizing: border-box; pointer-events: none; min-width: 6px; }
.tokens-body { display: grid; grid-template-columns: minmax(0, 1fr) 16em; gap: 10px; }
.tokens-text { height: 340px; overflow-y: scroll; overflow-x: hidden; contain: strict;
  overflow-anchor: none; border: 1px solid var(--line); border-radius: 4px;
  font: 13px/${LINE_HEIGHT}px var(--jp-code-font-family, Menlo, Consolas, "DejaVu Sans Mono",
  monospace); cursor: text; box-sizing: border-box; }
.tokens-lines { position: relative; overflow: hidden; }
.tokens-line { position: absolute; left: 0; right: 0; height: ${LINE_HEIGHT}px; white-space: pre;
  contain: layout style; }
.tokens-line::before { content: attr(data-at); display: inline-block; width: ${GUTTER - 1}ch;
  margin-right: 1ch; text-align: right; color: var(--faint); font-size: inherit; }
.tokens-line.parts { border-top: 1px solid var(--line); color: var(--faint); }
/* A thin line of paper parts tokens; rounded corners and dots are too dear to scroll. */
.t { padding: 2px 0; border-left: 1px solid var(--paper); margin-left: -1px; }
.dspark-tokens .t.prompt, .t.padding { color: var(--faint); }
.dspark-tokens .t.covered { background: var(--covered-tint);
  border-bottom: 2px solid var(--covered); }
.dspark-tokens .t.not-covered { background: var(--notCovered-tint);
  border-bottom: 2px dashed var(--notCovered); }
.dspark-tokens .t.never-a-label { background: var(--never-tint);
  border-bottom: 4px double var(--never); }
.dspark-tokens .t.anchor { font-weight: 700; box-shadow: inset 0 0 0 2px var(--anchor); }
.t.context { box-shadow: 0 -3px 0 -1px var(--context); }
.t.anchor.context { box-shadow: inset 0 0 0 2px var(--anchor), 0 -3px 0 -1px var(--context); }
.t.label { outline: 2px solid var(--focus); outline-offset: -1px; }
.t.label.unsupervised { outline-style: dotted; }
.dspark-tokens .t.chosen { outline: 3px solid var(--anchor); background: var(--paper);
  color: var(--ink); }
.dspark-tokens .t.match { background: var(--match); color: var(--ink); text-decoration: underline; }
.dspark-tokens .t.match.current { outline: 2px solid var(--ink); }
.t.cursor { outline: 2px dashed var(--ink); outline-offset: 1px; }
.tokens-side { display: flex; flex-direction: column; gap: 6px; height: 340px; min-height: 0; }
.tokens-side ol { list-style: none; margin: 0; padding: 0; overflow-y: auto; flex: 1;
  border: 1px solid var(--line); border-radius: 4px; }
.dspark-tokens .tokens-side li button { display: flex; gap: 8px; width: 100%; border: none;
  border-radius: 0; text-align: left; font-size: 12px; font-variant-numeric: tabular-nums; }
.tokens-side li span:first-child { flex: 1; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; font-family: var(--jp-code-font-family, monospace); }
.tokens-side li span:not(:first-child) { color: var(--faint); }
.tokens-side p { margin: 0; color: var(--faint); font-size: 12px; }
.tokens-card { height: 98px; overflow-y: auto; margin-top: 6px; padding: 4px 8px;
  border: 1px solid var(--line); border-radius: 4px; box-sizing: border-box; }
.tokens-card div { overflow-wrap: anywhere; }
.dspark-tokens .tokens-card button { min-height: 22px; padding: 0 6px; margin: 2px 4px 2px 0;
  font-size: 12px; }
@container (max-width: 820px) {
  .tokens-body { grid-template-columns: minmax(0, 1fr); }
  .tokens-side { height: 150px; }
}`;

function render({ model, el }) {
  let colours, texts = [], shown = 0, text, lines = new Int32Array(0), columns = 0;
  let [cursor, pinned, hovered] = [-1, -1, -1];
  let [matches, match, list] = [[], -1, TOKEN_LISTS[0]];
  let lights = { roles: new Map(), context: [0, 0] };
  const inView = new Map();

  const body = node("div", { class: "tokens-lines" });
  const box = node("div", {
    class: "tokens-text", tabindex: 0, role: "application", "aria-label": "The row's tokens. "
      + "Arrow keys move a cursor, Enter lights up the blocks that cover its token one by one, "
      + "Escape lets go, a slash goes to the search.",
  }, body);
  const turner = (name, step, sign) =>
    node("button", { type: "button", "aria-label": name, onclick: () => turn(step) }, sign);
  const chooser = node("select", { "aria-label": "mask", onchange: () => choose(chooser.value) });
  const search = node("input", { type: "search", placeholder: "search the text",
    "aria-label": "search the text", oninput: () => find(), onkeydown: searchKeys });
  const found = node("output", { "aria-live": "polite" });
  const bar = node("div", { class: "tokens-bar" }, chooser, search,
    turner("previous match", -1, "‹"), turner("next match", 1, "›"), found);
  const legend = node("div", { class: "tokens-legend", role: "group",
    "aria-label": "kinds of tokens: each button goes to the next" });
  const padding = node("span");
  const kinds = Object.keys(TOKEN_KINDS).map((kind) => {
    const button = node("button", { type: "button", class: `t ${kind.replaceAll(" ", "-")}`,
      onclick: () => jump(nextOfKind(text, kind, cursor)) });
    legend.append(button);
    return [kind, button];
  });
  legend.append(padding);
  const view = node("div", { class: "tokens-view" });
  const mapBox = node("div", { class: "tokens-map" });
  const lists = node("select", { "aria-label": "list", onchange: () => {
    list = lists.value;
    places.scrollTop = 0;
    showList();
  } }, TOKEN_LISTS.map((name) => node("option", {}, name)));
  const places = node("ol", { "aria-label": "places to go to", tabindex: -1 });
  const listed = node("p");
  const card = node("div", { class: "tokens-card" });
  const root = node("div", { class: "dspark-tokens" }, bar, legend, mapBox,
    node("div", { class: "tokens-body" }, box,
      node("div", { class: "tokens-side" }, lists, listed, places)),
    card);
  el.replaceChildren(root);
  addStyle(el, TOKENS_STYLE);
  ownKeys(root);
  const map = canvasIn(mapBox, drawMap);
  map.canvas.setAttribute("role", "img");
  map.canvas.setAttribute("aria-label", "Map of the row: states, anchors and documents");
  mapBox.append(view);
  const spoken = speaker(root);
  // Colours are measured once the widget stands on its page.
  let words = null;

  // ---- Colours and sizes

  function dress() {
    words ??= tip(root);
    root.removeAttribute("style");
    colours = palette(el);
    for (const [name, colour] of Object.entries(colours)) {
      if (typeof colour === "string") root.style.setProperty(`--${name}`, colour);
    }
    const strength = colours.dark ? 0.34 : 0.24;
    for (const name of ["covered", "notCovered", "never"]) {
      root.style.setProperty(`--${name}-tint`, mixed(colours[name], colours.paper, strength));
    }
    root.style.setProperty("--match", mixed("#f5d800", colours.paper, colours.dark ? 0.38 : 0.6));
    map.redraw();
  }

  const pen = document.createElement("canvas").getContext("2d");
  let [font, letter] = ["", 0];
  const widths = new Map();
  function cells(part) {
    if (/^[\x20-\x7e]*$/.test(part)) return part.length;
    let wide = widths.get(part);
    if (wide === undefined) {
      wide = pen.measureText(part.replaceAll("\n", "")).width / letter;
      widths.set(part, wide);
    }
    return wide;
  }

  // Breaks the lines for the present width; the first token in view stays where it is.
  function layOut(keep = firstInView()) {
    const style = getComputedStyle(box);
    const now = `${style.fontSize} ${style.fontFamily}`;
    if (now !== font) {
      font = pen.font = now;
      letter = pen.measureText("0".repeat(100)).width / 100;
      widths.clear();
    }
    columns = Math.max(10, Math.floor((box.clientWidth - 6) / letter) - GUTTER);
    lines = breakLines(text, columns, cells);
    body.style.height = `${(lines.length / 2) * LINE_HEIGHT}px`;
    clear();
    if (keep) box.scrollTop = lineOf(lines, keep.token) * LINE_HEIGHT + keep.offset;
    fill();
  }

  function firstInView() {
    if (!lines.length) return null;
    const line = Math.min(Math.floor(box.scrollTop / LINE_HEIGHT), lines.length / 2 - 1);
    return { token: lines[2 * line], offset: box.scrollTop - lineOf(lines, lines[2 * line])
      * LINE_HEIGHT };
  }

  // ---- Lines in view

  function clear() {
    body.replaceChildren();
    inView.clear();
  }

  function fill() {
    const total = lines.length / 2;
    const first = Math.max(0, Math.floor(box.scrollTop / LINE_HEIGHT) - SPARE_LINES);
    const past = Math.min(total,
      Math.ceil((box.scrollTop + box.clientHeight) / LINE_HEIGHT) + SPARE_LINES);
    for (const [line, div] of inView) {
      if (line < first || line >= past) {
        div.remove();
        inView.delete(line);
      }
    }
    // In the order of the text, for those who listen to it.
    let after = null;
    for (let line = past - 1; line >= first; line--) {
      let div = inView.get(line);
      if (!div) {
        div = lineElement(line);
        inView.set(line, div);
        body.insertBefore(div, after);
      }
      after = div;
    }
    placeView();
  }

  function lineElement(line) {
    const token = lines[2 * line];
    const div = document.createElement("div");
    div.className = "tokens-line";
    div.style.top = `${line * LINE_HEIGHT}px`;
    if (lines[2 * line + 1] === DIVIDER) {
      div.classList.add("parts");
      div.textContent = `document ${documentOf(text, token)}`;
      return div;
    }
    div.dataset.at = count(token);
    for (const [number, part] of partsOf(text, lines, line)) {
      const span = document.createElement("span");
      span.dataset.token = number;
      span.className = classOf(number);
      span.textContent = part;
      div.append(span);
    }
    return div;
  }

  function classOf(token) {
    let name = `t ${TOKEN_STATES[text.states[token]].replaceAll(" ", "-")}`;
    if (text.blockAt.has(token)) name += " anchor";
    else if (text.candidates[token]) name += " candidate";
    if (token >= lights.context[0] && token < lights.context[1]) name += " context";
    const role = lights.roles.get(token);
    if (role) name += ` ${role}`;
    if (token === cursor) name += " cursor";
    if (matches.length) {
      const at = matchAt(token);
      if (at >= 0) name += at === match ? " match current" : " match";
    }
    return name;
  }

  function restyle() {
    for (const div of inView.values()) {
      for (const span of div.children) {
        const name = classOf(Number(span.dataset.token));
        if (span.className !== name) span.className = name;
      }
    }
  }

  // ---- What is lit

  // A pinned block with its context, or else the blocks that cover the token looked at.
  function lightUp() {
    const roles = new Map();
    let context = [0, 0];
    const lightBlock = (block) => {
      const anchor = text.anchors[block];
      for (let label = 0; label < labelsOf(text, block); label++) {
        const kind = label < text.supervised[block] ? "label" : "label unsupervised";
        if (roles.get(anchor + 1 + label) !== "label") roles.set(anchor + 1 + label, kind);
      }
    };
    const token = hovered >= 0 ? hovered : cursor;
    if (pinned >= 0) {
      const anchor = text.anchors[pinned];
      lightBlock(pinned);
      roles.set(anchor, "chosen");
      context = [text.documents[documentOf(text, anchor)] ?? 0, anchor];
    }
    if (token >= 0 && (pinned < 0 || hovered >= 0)) {
      const covering = coveringBlocks(text, token).map(({ block }) => block);
      if (text.blockAt.has(token)) covering.push(text.blockAt.get(token));
      covering.forEach(lightBlock);
      covering.forEach((block) => roles.set(text.anchors[block], "chosen"));
    }
    lights = { roles, context };
    restyle();
  }

  function showCard() {
    const parts = [];
    if (pinned >= 0) parts.push(...blockFacts(text, pinned));
    else if (cursor >= 0) {
      const [first, ...others] = tokenFacts(text, cursor);
      parts.push(first, others.join(" · "));
      if (texts.length > 1 && texts[0].joined === texts[1].joined) {
        const other = texts[1 - shown];
        parts.push(`Under ${other.name}: ${TOKEN_STATES[other.states[cursor]]}`);
      }
    } else {
      parts.push("Point at a token to see what covers it; click an anchor to light up its block.");
    }
    card.replaceChildren(...parts.map((part) => node("div", {}, part)));
    if (cursor < 0) return;
    const covering = coveringBlocks(text, cursor);
    const own = text.blockAt.get(cursor);
    if (own !== undefined) covering.unshift({ block: own, slot: -1 });
    const buttons = covering.map(({ block, slot }) => node("button", {
      type: "button", "aria-pressed": String(block === pinned),
      onclick: () => pin(block === pinned ? -1 : block),
    }, slot < 0 ? `its block ${block}` : `block ${block}, slot ${slot}, anchor `
      + `${count(text.anchors[block])} ${quoted(text.texts[text.anchors[block]])}`));
    if (buttons.length) card.append(node("div", {}, ...buttons));
  }

  function select() {
    lightUp();
    showCard();
    map.redraw();
    const chosen = cursor < 0 && pinned < 0 ? null
      : { token: cursor, block: pinned < 0 ? null : pinned, text: shown };
    if (JSON.stringify(chosen) === JSON.stringify(model.get("selection"))) return;
    model.set("selection", chosen);
    model.save_changes();
  }

  function pin(block) {
    pinned = block;
    select();
    if (block >= 0) spoken.say(blockFacts(text, block).join(". "));
  }

  function point(token) {
    cursor = token;
    hovered = -1;
    pinned = -1;
    words?.hide();
    select();
    const covering = coveringBlocks(text, token);
    const by = covering.map(({ block, slot }) => `block ${block}, slot ${slot}`);
    spoken.say([...tokenFacts(text, token), ...by].join(". "));
  }

  // Brings a token into view where it is not, and points at it.
  function jump(token, past = token + 1) {
    if (token < 0) return;
    const top = lineOf(lines, token) * LINE_HEIGHT;
    const bottom = (lineOf(lines, past - 1) + 1) * LINE_HEIGHT;
    if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) {
      const room = Math.max(LINE_HEIGHT, (box.clientHeight - (bottom - top)) / 2);
      box.scrollTop = top - room;
    }
    fill();
    point(token);
  }

  // ---- Search

  function matchAt(token) {
    let [low, high] = [0, matches.length / 2];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (matches[2 * middle + 1] < token) low = middle + 1;
      else high = middle;
    }
    return 2 * low < matches.length && matches[2 * low] <= token ? low : -1;
  }

  function find(again = false) {
    const from = firstInView()?.token ?? 0;
    matches = findText(text, search.value);
    const total = matches.length / 2;
    if (!again || match >= total) {
      match = total ? 0 : -1;
      while (match >= 0 && match + 1 < total && matches[2 * match] < from) match++;
      if (!again && match >= 0) jump(matches[2 * match], matches[2 * match + 1] + 1);
    }
    showFound();
  }

  function turn(step) {
    const total = matches.length / 2;
    if (!total) return;
    match = (match + step + total) % total;
    jump(matches[2 * match], matches[2 * match + 1] + 1);
    showFound();
  }

  function showFound() {
    const total = matches.length / 2;
    const words = total ? `${count(match + 1)} of ${count(total)}` : "none";
    found.textContent = search.value ? words : "";
    restyle();
  }

  function searchKeys(event) {
    if (event.key === "Enter") turn(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape") {
      search.value = "";
      find();
      box.focus({ preventScroll: true });
    } else return;
    event.preventDefault();
  }

  // ---- Lists, legend, map

  function showList() {
    const { places: some, count: total } = listTokens(text, list);
    listed.textContent = total > some.length ? `${count(total)}, the first ${some.length}`
      : plural(total, list === "longest gap" ? "gap" : "token");
    places.replaceChildren(...some.map(({ position, tokens }) => {
      const part = text.texts.slice(position, position + Math.min(tokens, 12)).join("");
      const size = list === "longest gap" ? plural(tokens, "token")
        : list === "worst covered" ? text.chances[position].toFixed(3) : "";
      return node("li", {}, node("button", { type: "button",
        onclick: () => jump(position, position + tokens) },
      node("span", {}, visible(part, 60)), node("span", {}, size),
      node("span", {}, `at ${count(position)}`)));
    }));
  }

  function showLegend() {
    const counts = Object.fromEntries(kinds.map(([kind]) => [kind, 0]));
    for (let i = 0; i < text.length; i++) {
      counts[TOKEN_STATES[text.states[i]]]++;
      counts.candidate += text.candidates[i];
    }
    counts.anchor = text.kept.length;
    for (const [kind, button] of kinds) {
      button.textContent = `${kind} ${count(counts[kind])}`;
      button.disabled = !counts[kind];
    }
    const padded = text.texts.length - text.length;
    padding.textContent = padded ? `padding ${count(padded)}` : "";
  }

  function drawMap(context, width, height) {
    if (!text?.length || !colours) return;
    const parts = Math.max(1, Math.min(Math.floor(width), text.length));
    const [counts, each] = [mapColumns(text, parts), width / parts];
    const at = (token) => (token / text.length) * width;
    // What is covered stands on a line in the middle, gaps hang from it, and dots lie below.
    const [middle, high] = [Math.round(height / 2), height / 2 - 12];
    for (let part = 0; part < parts; part++) {
      const of = counts.subarray(part * TOKEN_STATES.length, (part + 1) * TOKEN_STATES.length);
      const all = of.reduce((sum, one) => sum + one, 0);
      const rectangle = (state, top, tall) => {
        if (!of[state]) return;
        context.fillStyle = colours[STATE_COLOURS[state]];
        context.fillRect(part * each, top, Math.max(each, 0.75), tall);
      };
      const covered = (of[COVERED] / all) * high;
      rectangle(COVERED, middle - covered, covered);
      rectangle(NOT_COVERED, middle, (of[NOT_COVERED] / all) * high);
      rectangle(NEVER, middle + high + 1, 3);
    }
    context.fillStyle = colours.anchor;
    for (const block of text.kept) {
      context.fillRect(at(text.anchors[block] + 0.5) - 0.75, 2, 1.5, 8);
    }
    context.fillStyle = colours.line;
    context.fillRect(0, middle - 0.5, width, 1);
    // Lines of more documents than this would hide all else.
    const parted = text.documents.length < width / 8 ? text.documents.subarray(1) : [];
    for (const start of parted) context.fillRect(at(start) - 0.5, 0, 1, height);
    if (pinned >= 0) {
      const anchor = text.anchors[pinned];
      context.fillStyle = colours.context;
      context.fillRect(at(lights.context[0]), height - 6, at(anchor) - at(lights.context[0]), 2);
      context.fillStyle = colours.focus;
      const wide = at(anchor + 1 + text.supervised[pinned]) - at(anchor);
      context.fillRect(at(anchor), height - 7, Math.max(3, wide), 4);
    }
    if (cursor >= 0) {
      context.fillStyle = colours.ink;
      context.beginPath();
      const x = at(cursor + 0.5);
      context.moveTo(x - 4, height);
      context.lineTo(x + 4, height);
      context.lineTo(x, height - 6);
      context.fill();
    }
  }

  function placeView() {
    if (!text?.length || !lines.length) return;
    const total = lines.length / 2;
    const first = Math.min(total - 1, Math.floor(box.scrollTop / LINE_HEIGHT));
    const past = Math.min(total, Math.ceil((box.scrollTop + box.clientHeight) / LINE_HEIGHT));
    const [from, to] = [lines[2 * first], past < total ? lines[2 * past] : text.length];
    view.style.left = `${(100 * from) / text.length}%`;
    view.style.width = `${(100 * (to - from)) / text.length}%`;
  }

  function mapJump(event) {
    const { left, width } = map.canvas.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - left) / width));
    const token = Math.min(text.length - 1, Math.floor(share * text.length));
    box.scrollTop = lineOf(lines, token) * LINE_HEIGHT - (box.clientHeight - LINE_HEIGHT) / 2;
    fill();
  }

  // ---- Pointer and keys

  const tokenUnder = (event) => {
    const span = event.target.closest?.(".t");
    return span && body.contains(span) ? Number(span.dataset.token) : -1;
  };

  function hover(event) {
    const token = tokenUnder(event);
    if (token >= 0) {
      const { left, top } = root.getBoundingClientRect();
      const covering = token === hovered ? null : coveringBlocks(text, token);
      if (covering) {
        tipLines = [...tokenFacts(text, token), ...covering.slice(0, 6).map(({ block, slot }) =>
          `by block ${block}, slot ${slot}, anchor ${count(text.anchors[block])} `
          + quoted(text.texts[text.anchors[block]]))];
        if (covering.length > 6) tipLines.push(`and ${covering.length - 6} blocks more`);
      }
      words?.show(event.clientX - left, event.clientY - top, tipLines);
    } else words?.hide();
    if (token === hovered) return;
    hovered = token;
    lightUp();
  }
  let tipLines = [];

  function leave() {
    words?.hide();
    if (hovered < 0) return;
    hovered = -1;
    lightUp();
  }

  function click(event) {
    const token = tokenUnder(event);
    // Whoever marks text to copy it does not point at a token.
    if (token < 0 || String(getSelection())) return;
    point(token);
    if (text.blockAt.has(token)) pin(text.blockAt.get(token));
  }

  // The token in a line that stands under or above a column.
  function tokenAtColumn(line, column) {
    let at = 0;
    const parts = partsOf(text, lines, line);
    for (const [token, part] of parts) {
      at += cells(part);
      if (at > column) return token;
    }
    return parts.at(-1)[0];
  }

  function moveLines(step) {
    const line = lineOf(lines, cursor);
    let column = 0;
    for (const [token, part] of partsOf(text, lines, line)) {
      if (token === cursor) break;
      column += cells(part);
    }
    const total = lines.length / 2;
    let to = Math.max(0, Math.min(total - 1, line + step));
    const divides = () => lines[2 * to + 1] === DIVIDER;
    while (divides() && to > 0 && to < total - 1) to += Math.sign(step);
    if (divides()) return cursor;
    return tokenAtColumn(to, column);
  }

  function press(event) {
    if (event.altKey || event.metaKey || !text?.length) return;
    const page = Math.max(1, Math.floor(box.clientHeight / LINE_HEIGHT) - 1);
    const last = text.length - 1;
    const line = () => partsOf(text, lines, lineOf(lines, cursor));
    const moves = {
      ArrowLeft: () => Math.max(0, cursor - 1), ArrowRight: () => Math.min(last, cursor + 1),
      ArrowUp: () => moveLines(-1), ArrowDown: () => moveLines(1),
      PageUp: () => moveLines(-page), PageDown: () => moveLines(page),
      Home: () => (event.ctrlKey ? 0 : line()[0][0]),
      End: () => (event.ctrlKey ? last : line().at(-1)[0]),
    };
    if (event.key in moves) {
      jump(cursor < 0 ? firstInView().token : moves[event.key]());
    } else if (event.key === "Enter" || event.key === " ") {
      if (cursor < 0) return;
      const blocks = coveringBlocks(text, cursor).map(({ block }) => block);
      if (text.blockAt.has(cursor)) blocks.unshift(text.blockAt.get(cursor));
      if (blocks.length) pin(blocks[(blocks.indexOf(pinned) + 1) % blocks.length]);
    } else if (event.key === "Escape") {
      if (pinned >= 0) pinned = -1;
      else cursor = -1;
      hovered = -1;
      select();
      spoken.say("let go");
    } else if (event.key === "/") search.focus();
    else return;
    event.preventDefault();
  }

  // ---- States

  let [rows, waiting, held] = [[], 0, null];

  function choose(number) {
    const before = text;
    shown = Math.min(Number(number), texts.length - 1);
    text = texts[shown];
    const seen = firstInView();
    const same = before ? sameTokens(before, text) : 0;
    // Blocks are known by their anchors.
    const anchor = pinned >= 0 && before ? before.anchors[pinned] : -1;
    if (cursor >= same) cursor = -1;
    pinned = anchor < same ? text.blockAt.get(anchor) ?? -1 : -1;
    hovered = -1;
    words?.hide();
    if (before?.joined !== text.joined || before?.documents !== text.documents) {
      clear();
      if (box.clientWidth) {
        layOut(seen && seen.token < same ? seen : { token: 0, offset: 0 });
      }
    }
    showLegend();
    showList();
    if (search.value) find(true);
    select();
    placeView();
  }

  function update() {
    waiting = 0;
    const state = model.get("state");
    const row = state?.row ?? model.get("row");
    if (!state?.states || !row?.texts) return;
    if (row !== held) {
      // A row is read once; one that is the same again keeps its lines.
      const read = [row, row.own].filter(Boolean).map(readRow);
      rows = read.map((one, i) => (rows[i]?.joined === one.joined
        && String(rows[i].documents) === String(one.documents)
        && sameTokens(rows[i], one) === one.length ? { ...rows[i], length: one.length } : one));
      held = row;
    }
    if (values(state.states, Uint8Array).length !== rows[0].texts.length) return;
    texts = [state, state.own].filter(Boolean).map((one, i) => readDraw(one, rows[i]));
    const names = texts.map((one) => one.name);
    if (names.join() !== [...chooser.options].map((option) => option.textContent).join()) {
      chooser.replaceChildren(...names.map((name, i) => node("option", { value: i }, name)));
    }
    chooser.hidden = texts.length < 2;
    chooser.value = Math.min(shown, texts.length - 1);
    choose(shown);
    el.dataset.frame = state.frame;
  }

  const soon = () => {
    waiting ||= requestAnimationFrame(update);
  };
  const scrolled = () => {
    fill();
    leave();
  };
  const dragging = (event) => {
    if (event.buttons & 1) mapJump(event);
  };
  const handlers = { scroll: scrolled, pointermove: hover, pointerleave: leave, click,
    keydown: press };
  for (const [name, call] of Object.entries(handlers)) {
    box.addEventListener(name, call, { passive: name !== "keydown" });
  }
  mapBox.addEventListener("pointerdown", (event) => {
    mapBox.setPointerCapture(event.pointerId);
    mapJump(event);
  });
  mapBox.addEventListener("pointermove", dragging);
  const watch = new ResizeObserver(() => {
    if (!box.clientWidth) return;
    if (!letter) dress();
    const wide = Math.max(10, Math.floor((box.clientWidth - 6) / (letter || 8)) - GUTTER);
    if (text && (!letter || wide !== columns)) layOut();
    else fill();
  });
  watch.observe(box);
  const stopTheme = onTheme(el, dress);
  const chosen = () => {
    const selection = model.get("selection");
    const [token, block] = [selection?.token ?? -1, selection?.block ?? -1];
    if (!text || (token === cursor && block === pinned)) return;
    [cursor, pinned] = [token, text.anchors.length > block ? block : -1];
    select();
  };
  if (el.isConnected) dress();
  model.on("change:state", soon);
  model.on("change:row", soon);
  model.on("change:selection", chosen);
  const before = model.get("selection");
  shown = before?.text ?? 0;
  update();
  if (before && text) {
    [cursor, pinned] = [before.token ?? -1, before.block ?? -1];
    select();
    if (cursor >= 0 && lines.length) jump(cursor);
  }
  return () => {
    model.off("change:state", soon);
    model.off("change:row", soon);
    model.off("change:selection", chosen);
    cancelAnimationFrame(waiting);
    watch.disconnect();
    stopTheme();
    map.stop();
    words?.stop();
  };
}

export default { render };
