// The text of a row as a widget: its lines, what is lit, search, lists, a map.
//
// Only the lines in view are elements. Lines are broken once for each width and all equally high,
// so that where a line stands follows from its number, whatever the row's length. What is said of
// tokens and blocks is tokens.js's; functions here take the widget first, `ui`, made by `render`.

const STATE_COLOURS = ["faint", "notCovered", "covered", "never", "faint"];
const LINE_HEIGHT = 26;
// Lines beyond the view's edges that are there before they come into view.
const SPARE_LINES = 6;
// Columns of the number at a line's beginning.
const GUTTER = 8;

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
/* A thin line of paper parts tokens; rounded corners and dots are too dear to scroll. A candidate
   begins with a line that is seen. */
.t { padding: 2px 0; border-left: 1px solid var(--paper); margin-left: -1px; }
.dspark-tokens .t.candidate { border-left: 1px solid var(--candidate); }
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
  const ui = {
    model, el,
    // The row's texts under one mask or two, the one that is shown, and its lines.
    rows: [], held: null, texts: [], shown: 0, text: null, lines: new Int32Array(0), columns: 0,
    // The tokens that keys and the pointer are at, and the block that is kept lit.
    cursor: -1, hovered: -1, pinned: -1, lights: { roles: new Map(), context: [0, 0] },
    matches: [], match: -1, list: TOKEN_LISTS[0], tipLines: [],
    inView: new Map(), waiting: 0, spare: 0, colours: null, words: null,
    font: "", letter: 0, widths: new Map(), pen: node("canvas").getContext("2d"),
  };
  ui.parts = tokenParts(ui);
  const { root, box, mapBox, view } = ui.parts;
  el.replaceChildren(root);
  addStyle(el, TOKENS_STYLE);
  ownKeys(root);
  ui.map = canvasIn(mapBox, (context, width, height) => drawMap(ui, context, width, height));
  ui.map.canvas.setAttribute("role", "img");
  ui.map.canvas.setAttribute("aria-label", "Map of the row: states, anchors and documents");
  mapBox.append(view);
  ui.spoken = speaker(root);
  listenToTokens(ui);
  const watch = new ResizeObserver(() => resized(ui));
  watch.observe(box);
  const stops = [onTheme(el, () => dress(ui)), followModel(ui), () => ui.map.stop(),
    () => ui.words?.stop(), () => watch.disconnect(), () => cancelAnimationFrame(ui.waiting),
    () => cancelAnimationFrame(ui.spare)];
  // Colours are measured once the widget stands on its page.
  if (el.isConnected) dress(ui);
  begin(ui);
  return () => stops.forEach((stop) => stop());
}

// Shows what there is, and goes to what was selected.
function begin(ui) {
  const before = ui.model.get("selection");
  ui.shown = before?.text ?? 0;
  update(ui);
  if (!before || !ui.text) return;
  [ui.cursor, ui.pinned] = [before.token ?? -1, before.block ?? -1];
  select(ui);
  if (ui.cursor >= 0 && ui.lines.length) jump(ui, ui.cursor);
}

// ---- Elements

function tokenParts(ui) {
  const body = node("div", { class: "tokens-lines" });
  const box = node("div", {
    class: "tokens-text", tabindex: 0, role: "application", "aria-label": "The row's tokens. "
      + "Arrow keys move a cursor, Enter lights up the blocks that cover its token one by one, "
      + "Escape lets go, a slash goes to the search.",
  }, body);
  const lists = node("select", { "aria-label": "list", onchange: () => {
    ui.list = lists.value;
    places.scrollTop = 0;
    showList(ui);
  } }, TOKEN_LISTS.map((name) => node("option", {}, name)));
  const places = node("ol", { "aria-label": "places to go to", tabindex: -1 });
  const parts = {
    body, box, lists, places, listed: node("p"), ...searchParts(ui), ...legendParts(ui),
    view: node("div", { class: "tokens-view" }), mapBox: node("div", { class: "tokens-map" }),
    card: node("div", { class: "tokens-card" }),
  };
  parts.root = node("div", { class: "dspark-tokens" }, parts.bar, parts.legend, parts.mapBox,
    node("div", { class: "tokens-body" }, box,
      node("div", { class: "tokens-side" }, lists, parts.listed, places)),
    parts.card);
  return parts;
}

function searchParts(ui) {
  const turner = (name, step, sign) =>
    node("button", { type: "button", "aria-label": name, onclick: () => turn(ui, step) }, sign);
  const chooser = node("select", { "aria-label": "mask", onchange: () =>
    choose(ui, chooser.value) });
  const search = node("input", { type: "search", placeholder: "search the text",
    "aria-label": "search the text", oninput: () => find(ui),
    onkeydown: (event) => searchKeys(ui, event) });
  const found = node("output", { "aria-live": "polite" });
  const bar = node("div", { class: "tokens-bar" }, chooser, search,
    turner("previous match", -1, "‹"), turner("next match", 1, "›"), found);
  return { chooser, search, found, bar };
}

function legendParts(ui) {
  const kinds = Object.keys(TOKEN_KINDS).map((kind) => [kind, node("button", {
    type: "button", class: `t ${kind.replaceAll(" ", "-")}`,
    onclick: () => jump(ui, nextOfKind(ui.text, kind, ui.cursor)),
  })]);
  const padding = node("span");
  const legend = node("div", { class: "tokens-legend", role: "group",
    "aria-label": "kinds of tokens: each button goes to the next" },
  kinds.map(([, button]) => button), padding);
  return { kinds, padding, legend };
}

// ---- Colours and sizes

function dress(ui) {
  const { root } = ui.parts;
  ui.words ??= tip(root);
  root.removeAttribute("style");
  const colours = ui.colours = palette(ui.el);
  for (const [name, colour] of Object.entries(colours)) {
    if (typeof colour === "string") root.style.setProperty(`--${name}`, colour);
  }
  const strength = colours.dark ? 0.34 : 0.24;
  for (const name of ["covered", "notCovered", "never"]) {
    root.style.setProperty(`--${name}-tint`, mixed(colours[name], colours.paper, strength));
  }
  root.style.setProperty("--match", mixed("#f5d800", colours.paper, colours.dark ? 0.38 : 0.6));
  ui.map.redraw();
}

// How many columns a text takes.
function cellsOf({ widths, pen, letter }, part) {
  if (/^[\x20-\x7e]*$/.test(part)) return part.length;
  let wide = widths.get(part);
  if (wide === undefined) {
    wide = pen.measureText(part.replaceAll("\n", "")).width / letter;
    widths.set(part, wide);
  }
  return wide;
}

function columnsOf({ parts: { box }, letter }) {
  return Math.max(10, Math.floor((box.clientWidth - 6) / (letter || 8)) - GUTTER);
}

// Breaks the lines for the present width; the first token in view stays where it is.
function layOut(ui, keep = firstInView(ui)) {
  const { box, body } = ui.parts;
  const style = getComputedStyle(box);
  const font = `${style.fontSize} ${style.fontFamily}`;
  if (font !== ui.font) {
    ui.font = ui.pen.font = font;
    ui.letter = ui.pen.measureText("0".repeat(100)).width / 100;
    ui.widths.clear();
  }
  ui.columns = columnsOf(ui);
  ui.lines = breakLines(ui.text, ui.columns, (part) => cellsOf(ui, part));
  body.style.height = `${(ui.lines.length / 2) * LINE_HEIGHT}px`;
  clear(ui);
  if (keep) box.scrollTop = lineOf(ui.lines, keep.token) * LINE_HEIGHT + keep.offset;
  fill(ui);
}

function resized(ui) {
  if (!ui.parts.box.clientWidth) return;
  if (!ui.letter) dress(ui);
  if (ui.text && (!ui.letter || columnsOf(ui) !== ui.columns)) layOut(ui);
  else fill(ui);
}

function firstInView({ lines, parts: { box } }) {
  if (!lines.length) return null;
  const line = Math.min(Math.floor(box.scrollTop / LINE_HEIGHT), lines.length / 2 - 1);
  return { token: lines[2 * line], offset: box.scrollTop - lineOf(lines, lines[2 * line])
    * LINE_HEIGHT };
}

// ---- Lines in view

function clear({ parts: { body }, inView }) {
  body.replaceChildren();
  inView.clear();
}

// The lines that the box shows, as [first, past].
function linesInBox({ lines, parts: { box } }) {
  const past = Math.ceil((box.scrollTop + box.clientHeight) / LINE_HEIGHT);
  return [Math.floor(box.scrollTop / LINE_HEIGHT), Math.min(lines.length / 2, past)];
}

// Makes the lines in view, and those near it; far from where one was, these have time until later.
function fill(ui) {
  const { inView, parts: { body } } = ui;
  const [begin, end] = linesInBox(ui);
  const near = !inView.size || inView.has(begin) || inView.has(end - 1);
  const spare = near ? SPARE_LINES : 0;
  if (!near) ui.spare ||= requestAnimationFrame(() => {
    ui.spare = 0;
    fill(ui);
  });
  const [first, past] = [Math.max(0, begin - spare), Math.min(ui.lines.length / 2, end + spare)];
  for (const [line, div] of inView) {
    if (line >= first && line < past) continue;
    div.remove();
    inView.delete(line);
  }
  // In the order of the text, for those who listen to it.
  let after = null;
  for (let line = past - 1; line >= first; line--) {
    let div = inView.get(line);
    if (!div) {
      div = lineElement(ui, line);
      inView.set(line, div);
      body.insertBefore(div, after);
    }
    after = div;
  }
  placeView(ui);
}

function lineElement(ui, line) {
  const { text, lines } = ui;
  const token = lines[2 * line];
  const div = document.createElement("div");
  div.className = "tokens-line";
  div.style.top = `${line * LINE_HEIGHT}px`;
  if (lines[2 * line + 1] === DIVIDER) {
    div.classList.add("parts");
    div.textContent = `document ${documentOf(text, token)}`;
    return div;
  }
  div.setAttribute("data-at", count(token));
  for (const [number, part] of partsOf(text, lines, line)) {
    const span = document.createElement("span");
    span.setAttribute("data-token", number);
    span.className = classOf(ui, number);
    span.textContent = part;
    div.append(span);
  }
  return div;
}

const STATE_CLASSES = TOKEN_STATES.map((state) => `t ${state.replaceAll(" ", "-")}`);

function classOf(ui, token) {
  const { text, lights } = ui;
  let name = STATE_CLASSES[text.states[token]];
  if (text.blockAt.has(token)) name += " anchor";
  else if (text.candidates[token]) name += " candidate";
  if (token >= lights.context[0] && token < lights.context[1]) name += " context";
  const role = lights.roles.get(token);
  if (role) name += ` ${role}`;
  if (token === ui.cursor) name += " cursor";
  const match = matchAt(ui, token);
  if (match >= 0) name += match === ui.match ? " match current" : " match";
  return name;
}

function restyle(ui) {
  for (const div of ui.inView.values()) {
    for (const span of div.children) {
      const name = classOf(ui, Number(span.dataset.token));
      if (span.className !== name) span.className = name;
    }
  }
}

// ---- What is lit

// A pinned block with its context, or else the blocks that cover the token looked at.
function lightUp(ui) {
  const { text, pinned, hovered } = ui;
  const roles = new Map();
  let context = [0, 0];
  const token = hovered >= 0 ? hovered : ui.cursor;
  if (pinned >= 0) {
    const anchor = text.anchors[pinned];
    lightBlock(text, roles, pinned);
    roles.set(anchor, "chosen");
    context = [text.documents[documentOf(text, anchor)] ?? 0, anchor];
  }
  if (token >= 0 && (pinned < 0 || hovered >= 0)) {
    const covering = blocksAt(text, token);
    covering.forEach((block) => lightBlock(text, roles, block));
    covering.forEach((block) => roles.set(text.anchors[block], "chosen"));
  }
  ui.lights = { roles, context };
  restyle(ui);
}

function lightBlock(text, roles, block) {
  const anchor = text.anchors[block];
  for (let label = 0; label < labelsOf(text, block); label++) {
    const kind = label < text.supervised[block] ? "label" : "label unsupervised";
    if (roles.get(anchor + 1 + label) !== "label") roles.set(anchor + 1 + label, kind);
  }
}

// The blocks that cover a token, the one that it is the anchor of first.
function blocksAt(text, token) {
  const own = text.blockAt.get(token);
  const covering = coveringBlocks(text, token).map(({ block }) => block);
  return own === undefined ? covering : [own, ...covering];
}

function slotWords(text, { block, slot }) {
  const anchor = text.anchors[block];
  return `block ${block}, slot ${slot}, anchor ${count(anchor)} ${quoted(text.texts[anchor])}`;
}

function showCard(ui) {
  const { text, cursor, parts: { card } } = ui;
  card.replaceChildren(...cardLines(ui).map((part) => node("div", {}, part)));
  if (cursor < 0) return;
  const blockButton = (block, words) => node("button", {
    type: "button", "aria-pressed": String(block === ui.pinned),
    onclick: () => pin(ui, block === ui.pinned ? -1 : block),
  }, words);
  const own = text.blockAt.get(cursor);
  const buttons = own === undefined ? [] : [blockButton(own, `its block ${own}`)];
  for (const found of coveringBlocks(text, cursor)) {
    buttons.push(blockButton(found.block, slotWords(text, found)));
  }
  if (buttons.length) card.append(node("div", {}, ...buttons));
}

function cardLines({ text, texts, shown, pinned, cursor }) {
  if (pinned >= 0) return blockFacts(text, pinned);
  if (cursor < 0) {
    return ["Point at a token to see what covers it; click an anchor to light up its block."];
  }
  const [first, ...others] = tokenFacts(text, cursor);
  const lines = [first, others.join(" · ")];
  if (texts.length > 1 && texts[0].joined === texts[1].joined) {
    const other = texts[1 - shown];
    lines.push(`Under ${other.name}: ${TOKEN_STATES[other.states[cursor]]}`);
  }
  return lines;
}

function select(ui) {
  const { model, cursor, pinned, shown } = ui;
  lightUp(ui);
  showCard(ui);
  ui.map.redraw();
  const chosen = cursor < 0 && pinned < 0 ? null
    : { token: cursor, block: pinned < 0 ? null : pinned, text: shown };
  if (JSON.stringify(chosen) === JSON.stringify(model.get("selection"))) return;
  model.set("selection", chosen);
  model.save_changes();
}

function pin(ui, block) {
  ui.pinned = block;
  select(ui);
  if (block >= 0) ui.spoken.say(blockFacts(ui.text, block).join(". "));
}

function point(ui, token) {
  const { text } = ui;
  [ui.cursor, ui.hovered, ui.pinned] = [token, -1, -1];
  ui.words?.hide();
  select(ui);
  const by = coveringBlocks(text, token).map(({ block, slot }) => `block ${block}, slot ${slot}`);
  ui.spoken.say([...tokenFacts(text, token), ...by].join(". "));
}

// Brings a token into view where it is not, and points at it.
function jump(ui, token, past = token + 1) {
  if (token < 0) return;
  const { lines, parts: { box } } = ui;
  const top = lineOf(lines, token) * LINE_HEIGHT;
  const bottom = (lineOf(lines, past - 1) + 1) * LINE_HEIGHT;
  if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) {
    const room = Math.max(LINE_HEIGHT, (box.clientHeight - (bottom - top)) / 2);
    box.scrollTop = top - room;
  }
  fill(ui);
  point(ui, token);
}

// ---- Search

// Which match a token belongs to; -1 where it is none's.
function matchAt({ matches }, token) {
  let [low, high] = [0, matches.length / 2];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (matches[2 * middle + 1] < token) low = middle + 1;
    else high = middle;
  }
  return 2 * low < matches.length && matches[2 * low] <= token ? low : -1;
}

function find(ui, again = false) {
  const from = firstInView(ui)?.token ?? 0;
  const matches = ui.matches = findText(ui.text, ui.parts.search.value);
  const total = matches.length / 2;
  if (!again || ui.match >= total) {
    let match = total ? 0 : -1;
    while (match >= 0 && match + 1 < total && matches[2 * match] < from) match++;
    ui.match = match;
    if (!again && match >= 0) jump(ui, matches[2 * match], matches[2 * match + 1] + 1);
  }
  showFound(ui);
}

function turn(ui, step) {
  const { matches } = ui;
  const total = matches.length / 2;
  if (!total) return;
  ui.match = (ui.match + step + total) % total;
  jump(ui, matches[2 * ui.match], matches[2 * ui.match + 1] + 1);
  showFound(ui);
}

function showFound(ui) {
  const { search, found } = ui.parts;
  const total = ui.matches.length / 2;
  const words = total ? `${count(ui.match + 1)} of ${count(total)}` : "none";
  found.textContent = search.value ? words : "";
  restyle(ui);
}

function searchKeys(ui, event) {
  if (event.key === "Enter") turn(ui, event.shiftKey ? -1 : 1);
  else if (event.key === "Escape") {
    ui.parts.search.value = "";
    find(ui);
    ui.parts.box.focus({ preventScroll: true });
  } else return;
  event.preventDefault();
}

// ---- Lists and legend

function showList(ui) {
  const { text, list, parts: { listed, places } } = ui;
  const { places: some, count: total } = listTokens(text, list);
  listed.textContent = total > some.length ? `${count(total)}, the first ${some.length}`
    : plural(total, list === "longest gap" ? "gap" : "token");
  places.replaceChildren(...some.map((place) => placeElement(ui, place)));
}

function placeElement(ui, { position, tokens }) {
  const { text, list } = ui;
  const part = text.texts.slice(position, position + Math.min(tokens, 12)).join("");
  const size = list === "longest gap" ? plural(tokens, "token")
    : list === "worst covered" ? text.chances[position].toFixed(3) : "";
  return node("li", {}, node("button", { type: "button",
    onclick: () => jump(ui, position, position + tokens) },
  node("span", {}, visible(part, 60)), node("span", {}, size),
  node("span", {}, `at ${count(position)}`)));
}

function showLegend({ text, parts: { kinds, padding } }) {
  const counts = Object.fromEntries(kinds.map(([kind]) => [kind, 0]));
  const ofStates = TOKEN_STATES.map(() => 0);
  for (let i = 0; i < text.length; i++) {
    ofStates[text.states[i]]++;
    counts.candidate += text.candidates[i];
  }
  TOKEN_STATES.forEach((state, i) => { counts[state] = ofStates[i]; });
  counts.anchor = text.kept.length;
  for (const [kind, button] of kinds) {
    button.textContent = `${kind} ${count(counts[kind])}`;
    button.disabled = !counts[kind];
  }
  const padded = text.texts.length - text.length;
  padding.textContent = padded ? `padding ${count(padded)}` : "";
}

// ---- The map

function drawMap(ui, context, width, height) {
  const { text, colours } = ui;
  if (!text?.length || !colours) return;
  const at = (token) => (token / text.length) * width;
  // What is covered stands on a line in the middle, gaps hang from it, and dots lie below.
  const middle = Math.round(height / 2);
  drawStates(ui, context, width, middle, height / 2 - 12);
  context.fillStyle = colours.anchor;
  for (const block of text.kept) {
    context.fillRect(at(text.anchors[block] + 0.5) - 0.75, 2, 1.5, 8);
  }
  context.fillStyle = colours.line;
  context.fillRect(0, middle - 0.5, width, 1);
  // Lines of more documents than this would hide all else.
  const parted = text.documents.length < width / 8 ? text.documents.subarray(1) : [];
  for (const start of parted) context.fillRect(at(start) - 0.5, 0, 1, height);
  if (ui.pinned >= 0) drawPinned(ui, context, height, at);
  if (ui.cursor >= 0) drawCursor(ui, context, height, at);
}

function drawStates({ text, colours }, context, width, middle, high) {
  const parts = Math.max(1, Math.min(Math.floor(width), text.length));
  const [counts, each] = [mapColumns(text, parts), width / parts];
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
}

function drawPinned({ text, pinned, lights, colours }, context, height, at) {
  const anchor = text.anchors[pinned];
  context.fillStyle = colours.context;
  context.fillRect(at(lights.context[0]), height - 6, at(anchor) - at(lights.context[0]), 2);
  context.fillStyle = colours.focus;
  const wide = at(anchor + 1 + text.supervised[pinned]) - at(anchor);
  context.fillRect(at(anchor), height - 7, Math.max(3, wide), 4);
}

function drawCursor({ cursor, colours }, context, height, at) {
  const x = at(cursor + 0.5);
  context.fillStyle = colours.ink;
  context.beginPath();
  context.moveTo(x - 4, height);
  context.lineTo(x + 4, height);
  context.lineTo(x, height - 6);
  context.fill();
}

// Where on the map the lines in view are.
function placeView(ui) {
  const { text, lines, parts: { view } } = ui;
  if (!text?.length || !lines.length) return;
  const total = lines.length / 2;
  const [begin, past] = linesInBox(ui);
  const [from, to] = [lines[2 * Math.min(total - 1, begin)],
    past < total ? lines[2 * past] : text.length];
  view.style.left = `${(100 * from) / text.length}%`;
  view.style.width = `${(100 * (to - from)) / text.length}%`;
}

function mapJump(ui, event) {
  const { text, lines, parts: { box } } = ui;
  const { left, width } = ui.map.canvas.getBoundingClientRect();
  const share = Math.max(0, Math.min(1, (event.clientX - left) / width));
  const token = Math.min(text.length - 1, Math.floor(share * text.length));
  box.scrollTop = lineOf(lines, token) * LINE_HEIGHT - (box.clientHeight - LINE_HEIGHT) / 2;
  fill(ui);
}

// ---- Pointer and keys

function listenToTokens(ui) {
  const { box, mapBox } = ui.parts;
  const scrolled = () => {
    fill(ui);
    leave(ui);
  };
  const handlers = { scroll: scrolled, pointermove: (event) => hover(ui, event),
    pointerleave: () => leave(ui), click: (event) => click(ui, event),
    keydown: (event) => press(ui, event) };
  for (const [name, call] of Object.entries(handlers)) {
    box.addEventListener(name, call, { passive: name !== "keydown" });
  }
  mapBox.addEventListener("pointerdown", (event) => {
    mapBox.setPointerCapture(event.pointerId);
    mapJump(ui, event);
  });
  mapBox.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) mapJump(ui, event);
  });
}

function tokenUnder({ parts: { body } }, event) {
  const span = event.target.closest?.(".t");
  return span && body.contains(span) ? Number(span.dataset.token) : -1;
}

function hover(ui, event) {
  const token = tokenUnder(ui, event);
  if (token < 0) ui.words?.hide();
  else {
    if (token !== ui.hovered) ui.tipLines = hoverLines(ui.text, token);
    const { left, top } = ui.parts.root.getBoundingClientRect();
    ui.words?.show(event.clientX - left, event.clientY - top, ui.tipLines);
  }
  if (token === ui.hovered) return;
  ui.hovered = token;
  lightUp(ui);
}

function hoverLines(text, token) {
  const covering = coveringBlocks(text, token);
  const by = covering.slice(0, 6).map((found) => `by ${slotWords(text, found)}`);
  const more = covering.length > 6 ? [`and ${covering.length - 6} blocks more`] : [];
  return [...tokenFacts(text, token), ...by, ...more];
}

function leave(ui) {
  ui.words?.hide();
  if (ui.hovered < 0) return;
  ui.hovered = -1;
  lightUp(ui);
}

function click(ui, event) {
  const token = tokenUnder(ui, event);
  // Whoever marks text to copy it does not point at a token.
  if (token < 0 || String(getSelection())) return;
  point(ui, token);
  if (ui.text.blockAt.has(token)) pin(ui, ui.text.blockAt.get(token));
}

// The token in a line that stands under or above a column.
function tokenAtColumn(ui, line, column) {
  let at = 0;
  const parts = partsOf(ui.text, ui.lines, line);
  for (const [token, part] of parts) {
    at += cellsOf(ui, part);
    if (at > column) return token;
  }
  return parts.at(-1)[0];
}

function moveLines(ui, step) {
  const { text, lines, cursor } = ui;
  const line = lineOf(lines, cursor);
  let column = 0;
  for (const [token, part] of partsOf(text, lines, line)) {
    if (token === cursor) break;
    column += cellsOf(ui, part);
  }
  const total = lines.length / 2;
  let to = Math.max(0, Math.min(total - 1, line + step));
  const divides = () => lines[2 * to + 1] === DIVIDER;
  while (divides() && to > 0 && to < total - 1) to += Math.sign(step);
  return divides() ? cursor : tokenAtColumn(ui, to, column);
}

// Where a key takes the cursor.
const CURSOR_MOVES = {
  ArrowLeft: ({ cursor }) => Math.max(0, cursor - 1),
  ArrowRight: ({ cursor, text }) => Math.min(text.length - 1, cursor + 1),
  ArrowUp: (ui) => moveLines(ui, -1),
  ArrowDown: (ui) => moveLines(ui, 1),
  PageUp: (ui) => moveLines(ui, -linesOfPage(ui)),
  PageDown: (ui) => moveLines(ui, linesOfPage(ui)),
  Home: (ui, event) => (event.ctrlKey ? 0 : lineAtCursor(ui)[0][0]),
  End: (ui, event) => (event.ctrlKey ? ui.text.length - 1 : lineAtCursor(ui).at(-1)[0]),
};

function linesOfPage({ parts: { box } }) {
  return Math.max(1, Math.floor(box.clientHeight / LINE_HEIGHT) - 1);
}

function lineAtCursor({ text, lines, cursor }) {
  return partsOf(text, lines, lineOf(lines, cursor));
}

function press(ui, event) {
  if (event.altKey || event.metaKey || !ui.text?.length) return;
  if (event.key in CURSOR_MOVES) {
    jump(ui, ui.cursor < 0 ? firstInView(ui).token : CURSOR_MOVES[event.key](ui, event));
  } else if (event.key === "Enter" || event.key === " ") {
    if (ui.cursor < 0) return;
    pinNext(ui);
  } else if (event.key === "Escape") letGo(ui);
  else if (event.key === "/") ui.parts.search.focus();
  else return;
  event.preventDefault();
}

// Lights up the next of the blocks that cover the cursor's token.
function pinNext(ui) {
  const blocks = blocksAt(ui.text, ui.cursor);
  if (blocks.length) pin(ui, blocks[(blocks.indexOf(ui.pinned) + 1) % blocks.length]);
}

function letGo(ui) {
  if (ui.pinned >= 0) ui.pinned = -1;
  else ui.cursor = -1;
  ui.hovered = -1;
  select(ui);
  ui.spoken.say("let go");
}

// ---- States

function followModel(ui) {
  const soon = () => {
    ui.waiting ||= requestAnimationFrame(() => update(ui));
  };
  const handlers = { "change:state": soon, "change:row": soon,
    "change:selection": () => takeSelection(ui) };
  for (const [event, call] of Object.entries(handlers)) ui.model.on(event, call);
  return () => {
    for (const [event, call] of Object.entries(handlers)) ui.model.off(event, call);
  };
}

function takeSelection(ui) {
  const selection = ui.model.get("selection");
  const [token, block] = [selection?.token ?? -1, selection?.block ?? -1];
  if (!ui.text || (token === ui.cursor && block === ui.pinned)) return;
  [ui.cursor, ui.pinned] = [token, ui.text.anchors.length > block ? block : -1];
  select(ui);
}

function update(ui) {
  ui.waiting = 0;
  const state = ui.model.get("state");
  const row = state?.row ?? ui.model.get("row");
  if (!state?.states || !row?.texts) return;
  if (row !== ui.held) takeRow(ui, row);
  if (values(state.states, Uint8Array).length !== ui.rows[0].texts.length) return;
  const { chooser } = ui.parts;
  ui.texts = [state, state.own].filter(Boolean).map((one, i) => readDraw(one, ui.rows[i]));
  const names = ui.texts.map((one) => one.name);
  if (names.join() !== [...chooser.options].map((option) => option.textContent).join()) {
    chooser.replaceChildren(...names.map((name, i) => node("option", { value: i }, name)));
  }
  chooser.hidden = ui.texts.length < 2;
  chooser.value = Math.min(ui.shown, ui.texts.length - 1);
  choose(ui, ui.shown);
  ui.el.dataset.frame = state.frame;
}

// A row is read once; one that is the same again keeps its lines.
function takeRow(ui, row) {
  const read = [row, row.own].filter(Boolean).map(readRow);
  const same = (old, one) => old?.joined === one.joined
    && String(old.documents) === String(one.documents) && sameTokens(old, one) === one.length;
  ui.rows = read.map((one, i) =>
    (same(ui.rows[i], one) ? { ...ui.rows[i], length: one.length } : one));
  ui.held = row;
}

// Shows the text under one of the masks; what is selected stays where it is still there.
function choose(ui, number) {
  const before = ui.text;
  ui.shown = Math.min(Number(number), ui.texts.length - 1);
  const text = ui.text = ui.texts[ui.shown];
  const seen = firstInView(ui);
  const same = before ? sameTokens(before, text) : 0;
  // Blocks are known by their anchors.
  const anchor = ui.pinned >= 0 && before ? before.anchors[ui.pinned] : -1;
  if (ui.cursor >= same) ui.cursor = -1;
  ui.pinned = anchor < same ? text.blockAt.get(anchor) ?? -1 : -1;
  ui.hovered = -1;
  ui.words?.hide();
  if (before?.joined !== text.joined || before?.documents !== text.documents) {
    clear(ui);
    if (ui.parts.box.clientWidth) {
      layOut(ui, seen && seen.token < same ? seen : { token: 0, offset: 0 });
    }
  }
  showLegend(ui);
  showList(ui);
  if (ui.parts.search.value) find(ui, true);
  select(ui);
  placeView(ui);
}

export default { render };
