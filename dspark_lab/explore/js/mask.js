// The mask as a widget: what the user does on its canvas, and what is said in words beside it.
//
// What the mask is says rule.js, how it is painted mask_paint.js. Functions here take the widget
// first, `ui`, which `render` makes: what is drawn (`read` from the state, and `scene`), where one
// is (`view`, `box`), the cells that are `hovered` and `pinned`, its elements (`parts`), and two
// canvases: `base` has the mask, `marks` above it the lit cells, so that hovering paints no mask.

// Room around the plot: names on the left, the bars that show where one is below and on the right.
const PLOT = { left: 122, right: 14, bottom: 14 };
const TILE_CHOICES = [8, 16, 32, 64, 128, 256, 512];
// After so many ms without a move the words follow what the pointer is on.
const STILL = 90;
const MASK_KEYS = [
  ["arrows", "move the selection by a cell"],
  ["Page Up, Page Down", "by a block"],
  ["Shift + arrows", "move the view"],
  ["+  -", "zoom at the selection"],
  ["0", "the whole mask"],
  ["Enter", "zoom in on the selection"],
  ["Escape", "let go of the selection"],
  ["n, p", "next, previous difference"],
  ["1 2 3 4", "regions, tiles, supervision, difference"],
  ["wheel, pinch, drag", "zoom and move"],
  ["?", "this list"],
];

const MASK_STYLE = `
.mask { position: relative; font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--mask-ink); container-type: inline-size; }
.mask * { box-sizing: border-box; }
.mask-bar { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-bottom: 6px; }
.mask-group { display: inline-flex; align-items: center; }
.mask button, .mask select { font: inherit; color: inherit; background: var(--mask-paper);
  border: 1px solid var(--mask-line); height: 28px; min-width: 30px; padding: 0 8px; margin: 0;
  cursor: pointer; border-radius: 0; }
.mask select { padding: 0 4px; }
.mask-group > :first-child { border-radius: 5px 0 0 5px; }
.mask-group > :last-child { border-radius: 0 5px 5px 0; }
.mask-group > :only-child { border-radius: 5px; }
.mask-group > * + * { margin-left: -1px !important; }
.mask button:hover:not(:disabled, [aria-pressed=true]) { background: var(--mask-tint); }
.mask button[aria-pressed=true] { background: var(--mask-ink); color: var(--mask-paper); }
.mask button:disabled { opacity: .5; cursor: default; }
.mask :focus-visible { outline: 2px solid var(--mask-focus); outline-offset: 1px; z-index: 1; }
.mask-space { flex: 1; }
.mask-legend { display: flex; flex-wrap: wrap; gap: 0 16px; max-height: 60px; overflow-y: auto;
  flex: none; font-size: 12px; line-height: 20px; }
.mask-legend span { display: inline-flex; align-items: center; gap: 5px; white-space: nowrap; }
.mask-legend b { font-weight: 600; font-variant-numeric: tabular-nums; min-width: 4.6em; }
.mask-legend img { width: 16px; height: 12px; border: 1px solid var(--mask-line); }
.mask-main { display: grid; grid-template-columns: 100%; gap: 8px;
  --mask-height: clamp(310px, 48vh, 490px); }
@container (min-width: 940px) { .mask-main { grid-template-columns: minmax(0, 1fr) 268px; } }
/* The legend takes what it needs of the stage, so that nothing else moves. */
.mask-plot { display: flex; flex-direction: column; gap: 3px; height: var(--mask-height); }
/* No round corners: each frame would be cut along them. */
.mask-stage { position: relative; flex: 1; min-height: 0; border: 1px solid var(--mask-line);
  contain: strict; }
.mask-layer { position: absolute; inset: 0; }
.mask-layer canvas { touch-action: none; outline-offset: -2px !important; }
.mask-layer + .mask-layer { pointer-events: none; }
.mask-layer.none { visibility: hidden; }
.mask-card { border: 1px solid var(--mask-line); border-radius: 5px; padding: 10px 12px;
  height: 168px; overflow-y: auto; overflow-wrap: anywhere; }
.mask-card h4 { margin: 0 0 6px; font-size: 13px; line-height: 1.4; display: flex; gap: 8px;
  justify-content: space-between; align-items: start; }
.mask-card h4 button { height: 22px; min-width: 24px; padding: 0 6px; font-size: 12px;
  font-weight: 400; border-radius: 4px; }
.mask-card dl { display: grid; grid-template-columns: fit-content(90px) 1fr fit-content(90px) 1fr;
  gap: 2px 10px; margin: 0; }
@container (min-width: 940px) {
  .mask-card { height: var(--mask-height); }
  .mask-card dl { grid-template-columns: fit-content(90px) 1fr; }
}
.mask-card dt { color: var(--mask-faint); }
.mask-card dd { margin: 0; }
.mask-card p { margin: 0 0 8px; }
.mask-why { border-left: 4px solid var(--mask-line); padding-left: 8px; font-weight: 600; }
.mask-why.seen { border-left-color: var(--mask-focus); }
.mask-card .faint, .mask-strip .faint { color: var(--mask-faint); }
.mask-strip { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; margin-top: 8px; }
.mask-strip > div { border: 1px solid var(--mask-line); border-radius: 5px; padding: 4px 8px;
  height: 88px; overflow: hidden; }
.mask-strip .faint { font-size: 11px; line-height: 16px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.mask-strip p { margin: 0; font: 12px/20px var(--jp-code-font-family, ui-monospace, Menlo, Consolas,
  monospace); height: 60px; overflow: hidden; overflow-wrap: anywhere; }
.mask-strip mark { color: inherit; background: none; border-radius: 2px; }
.mask-strip mark.key { outline: 2px solid var(--mask-context); outline-offset: -1px; }
.mask-strip mark.anchor { border-bottom: 3px solid var(--mask-own); font-weight: 700; }
.mask-strip mark.label { border-bottom: 3px double var(--mask-good); }
.mask-help { position: absolute; z-index: 6; right: 8px; top: 8px; background: var(--mask-paper);
  border: 1px solid var(--mask-line); border-radius: 5px; padding: 10px 14px; max-width: 90%;
  box-shadow: 0 2px 8px rgba(0,0,0,.3); font-size: 12px; }
.mask-help[hidden] { display: none; }
.mask-help dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 0; }
.mask-help dt { font-weight: 600; } .mask-help dd { margin: 0; }
`;

function render({ model, el }) {
  const ui = {
    model, el, read: null, scene: null, frame: 0, givenSize: null, side: "mask",
    layers: { regions: true, tiles: false, supervision: true, difference: true },
    view: { zoom: 0, x: 0, y: 0 }, box: { left: PLOT.left, top: 0, width: 1, height: 1 },
    hovered: null, pinned: model.get("selection") ?? null, pointer: null,
    // Whether the view moves now, and whether the lit cells were painted on the mask for that.
    moving: false, baked: false, still: 0,
    pointers: new Map(), start: null, dragged: false, outside: { x: NaN, y: NaN }, lastZoom: 0,
  };
  ui.root = node("div", { class: "mask", "data-lm-suppress-shortcuts": "true" });
  el.append(ui.root);
  addStyle(ui.root, MASK_STYLE);
  ui.parts = maskParts(ui);
  ui.base = canvasIn(ui.parts.under, (context, width, height) =>
    drawBase(ui, context, width, height), { opaque: true });
  ui.marks = canvasIn(ui.parts.over, (context) => paintCells(ui, context));
  ui.canvas = ui.base.canvas;
  ui.words = tip(ui.parts.stage);
  ui.say = speaker(ui.root).say;
  const stops = [listen(ui), follow(ui)];
  update(ui);
  return () => {
    clearTimeout(ui.still);
    for (const stop of [...stops, ui.words.stop, ui.base.stop, ui.marks.stop]) stop();
  };
}

// Brings the widget into step with the model and the page's theme; returns what ends that.
function follow(ui) {
  const { model, root } = ui;
  const handlers = {
    "change:state": () => update(ui), "change:row": () => update(ui),
    "change:selection": () => takeSelection(ui),
  };
  for (const [event, call] of Object.entries(handlers)) model.on(event, call);
  const stopTheme = onTheme(root, () => {
    if (!ui.scene) return;
    // The page's colours are measured behind the widget's own.
    ui.scene.colours = themed(ui);
    settle(ui);
  });
  return () => {
    for (const [event, call] of Object.entries(handlers)) model.off(event, call);
    stopTheme();
  };
}

// ---- Elements

function maskButton(label, title, call, more = {}) {
  const named = { type: "button", "aria-label": title, title, onclick: call };
  return node("button", { ...named, ...more }, label);
}

function maskParts(ui) {
  const { layers } = ui;
  const toggles = Object.fromEntries(Object.keys(layers).map((name, i) => [
    name, maskButton(name, `layer: ${name} (key ${i + 1})`, () => toggle(ui, name)),
  ]));
  const sizes = node("select", { "aria-label": "tile size", onchange: () => {
    layers.tiles = true;
    settle(ui);
  } }, TILE_CHOICES.map((size) => node("option", { value: size }, `${size}`)));
  const which = node("select", { "aria-label": "which mask is drawn", onchange: () => {
    ui.side = which.value;
    settle(ui);
  } });
  const next = maskButton("next difference", "next difference (key n)", () => jump(ui, false));
  const help = node("div", { class: "mask-help", hidden: true, role: "note" },
    describedList(MASK_KEYS));
  const ask = maskButton("?", "keys", () => showHelp(ui, help.hidden),
    { "aria-expanded": "false" });
  const [under, over] = [0, 1].map(() => node("div", { class: "mask-layer" }));
  const parts = {
    toggles, sizes, which, next, help, ask, under, over, compare: maskGroup(which, next),
    legend: node("div", { class: "mask-legend", role: "list", "aria-label": "legend" }),
    stage: node("div", { class: "mask-stage" }, under, over, help),
    card: node("div", { class: "mask-card", role: "region", "aria-label": "selected cell" }),
    strip: node("div", { class: "mask-strip" }),
  };
  ui.root.append(maskBar(ui, parts), node("div", { class: "mask-main" },
    node("div", { class: "mask-plot" }, parts.legend, parts.stage), parts.card), parts.strip);
  return parts;
}

function maskGroup(...children) {
  return node("span", { class: "mask-group", role: "group" }, ...children);
}

function maskBar(ui, { toggles, sizes, compare, ask }) {
  return node("div", { class: "mask-bar", role: "toolbar", "aria-label": "mask" },
    maskGroup(toggles.regions, toggles.tiles, sizes),
    maskGroup(toggles.supervision, toggles.difference),
    compare, node("span", { class: "mask-space" }),
    maskGroup(maskButton("−", "zoom out (key -)", () => zoomBy(ui, 1 / 2)),
      maskButton("+", "zoom in (key +)", () => zoomBy(ui, 2)),
      maskButton("fit", "the whole mask (key 0)", () => reset(ui, false)),
      maskButton("reset", "the whole mask, no selection, layers as at first",
        () => reset(ui, true)),
      ask));
}

// ---- Canvases

function drawBase(ui, context, width, height) {
  const { scene, box } = ui;
  if (!scene) return;
  box.width = Math.max(40, width - PLOT.left - PLOT.right);
  placePlot(ui, height);
  paintMask(context, scene, box, ui.view);
  // While the view moves, one canvas is quicker on the screen than two.
  ui.baked = ui.moving;
  ui.moving = false;
  if (ui.baked) paintCells(ui, context);
  ui.el.dataset.frame = ui.frame;
  const cell = cellSizes(scene.mask, box, ui.view.zoom);
  ui.el.dataset.view = JSON.stringify({ ...ui.view, box, cell });
  showMarks(ui);
}

// Names need more room above the plot than numbers: where they appear, the cells stay in place.
function placePlot(ui, height) {
  const { scene: { mask }, box } = ui;
  const [top, zoom] = [box.top, ui.view.zoom];
  const room = (above) => {
    box.top = above;
    box.height = Math.max(40, height - above - PLOT.bottom);
    return roomAbove(mask, cellSizes(mask, box, zoom)[0]);
  };
  room(room(roomAbove(mask, 0)));
  const [, high] = cellSizes(mask, box, zoom);
  ui.view = withinMask(mask, box, { ...ui.view, y: ui.view.y + (top ? box.top - top : 0) / high });
}

function paintCells(ui, context) {
  const { scene, box, view, pinned, hovered } = ui;
  if (!scene) return;
  if (pinned) paintCell(context, scene, box, view, pinned, true);
  if (hovered) paintCell(context, scene, box, view, hovered, false);
}

// Shows the canvas of lit cells where there are some.
function showMarks(ui) {
  const lit = !ui.baked && Boolean(ui.pinned || ui.hovered);
  ui.parts.over.classList.toggle("none", !lit);
  if (lit) ui.marks.paint();
}

// After another cell is lit.
function light(ui) {
  if (ui.baked) ui.base.redraw();
  else showMarks(ui);
}

// ---- What is drawn, from the state

function update(ui) {
  const state = ui.model.get("state");
  if (!state?.mask) return;
  ui.read = readState(state, rowOf(ui.model));
  ui.frame = state.frame ?? 0;
  if (state.tile_size !== ui.givenSize) takeTileSize(ui, state.tile_size);
  if (!ui.read.other) ui.side = "mask";
  nameMasks(ui);
  if (ui.pinned && !exists(ui, ui.pinned)) ui.pinned = null;
  ui.hovered = null;
  ui.words.hide();
  settle(ui);
}

function takeTileSize(ui, size) {
  const { sizes } = ui.parts;
  ui.givenSize = size;
  if (![...sizes.options].some((one) => Number(one.value) === size)) {
    sizes.append(node("option", { value: size }, `${size}`));
  }
  sizes.value = size;
}

function nameMasks({ read, side, parts: { which, compare } }) {
  const names = [read.mask.name || "this mask", read.other?.name ?? ""];
  if (names.join("\n") !== [...which.options].map((one) => one.textContent).join("\n")) {
    which.replaceChildren(node("option", { value: "mask" }, names[0]),
      node("option", { value: "other" }, names[1]));
  }
  which.value = side;
  compare.hidden = !read.other;
  compare.style.display = read.other ? "" : "none";
}

function takeSelection(ui) {
  const cell = ui.model.get("selection");
  if (cell?.query === ui.pinned?.query && cell?.key === ui.pinned?.key) return;
  ui.pinned = cell && ui.read && exists(ui, cell) ? cell : null;
  if (!ui.scene) return;
  showCard(ui);
  light(ui);
}

function exists({ read }, { query, key }) {
  return query >= 0 && query < read.mask.queries && key >= 0 && key < read.mask.keys;
}

// Brings all into step with the state, the layers, and the theme.
function settle(ui) {
  if (!ui.read) return;
  const { read, layers } = ui;
  const tileSize = Number(ui.parts.sizes.value);
  const mask = ui.side === "other" ? read.other : read.mask;
  const data = layerData(ui, mask, tileSize);
  const colours = ui.scene?.colours ?? themed(ui);
  const { blocks, row } = read;
  ui.scene = { source: read, mask, blocks, row, tileSize, layers, colours, data };
  ui.canvas.setAttribute("aria-label", `attention mask: ${mask.queries} queries, slots of `
    + `${mask.blocks} blocks; ${mask.keys} keys, ${mask.seq_len} of them context tokens. Arrow `
    + "keys move the selection, ? lists all keys.");
  showToggles(ui);
  showLegend(ui);
  showCard(ui);
  ui.base.redraw();
}

// The layers' rectangles and counts; what is known of the same mask is kept.
function layerData({ read, scene, layers }, mask, tileSize) {
  const old = scene?.source === read ? scene.data : {};
  const same = scene?.mask === mask;
  const data = {
    regions: same ? old.regions : rectangles(mask),
    counts: same ? old.counts : countRegions(mask),
    tiles: same && scene.tileSize === tileSize && old.tiles,
    difference: old.difference ?? (read.other && differenceRectangles(read.mask, read.other)),
    supervised: old.supervised ?? read.blocks.supervised.reduce((sum, one) => sum + one, 0),
  };
  data.tiles ||= layers.tiles ? tileRectangles(mask, tileSize) : null;
  data.found = old.found ?? (read.other && countDifferences(read.mask, data.difference));
  return data;
}

function showToggles({ read, layers, parts: { toggles, next }, scene: { data } }) {
  for (const [name, toggle] of Object.entries(toggles)) {
    const possible = name !== "difference" || read.other !== null;
    toggle.setAttribute("aria-pressed", layers[name] && possible);
  }
  toggles.difference.disabled = !read.other;
  toggles.difference.title = read.other ? "layer: difference (key 4)" : "there is no other mask";
  next.disabled = !data.found?.first;
}

function themed({ root, canvas }) {
  const colours = maskColours(root, canvas.getContext("2d"));
  const names = { ink: "ink", paper: "paper", line: "line", faint: "faint", focus: "focus",
    context: "context", own: "own", good: "accepted" };
  for (const [name, of] of Object.entries(names)) {
    root.style.setProperty(`--mask-${name}`, colours[of]);
  }
  root.style.setProperty("--mask-tint", mixed(colours.ink, colours.paper, 0.08));
  return colours;
}

// ---- Words

// A slider's move changes numbers of the legend, and seldom more.
function showLegend(ui) {
  const { legend } = ui.parts;
  const entries = legendEntries(ui);
  const known = ui.legend ?? [];
  const same = entries.length === known.length && entries.every(
    (entry, i) => entry.name === known[i].name && entry.look === known[i].look);
  if (!same) {
    legend.replaceChildren(...entries.map(({ name, look }) => node("span", { role: "listitem" },
      look && swatch(look), name, " ", node("b"))));
  }
  entries.forEach(({ count }, i) => {
    if (same && count === known[i].count) return;
    legend.children[i].lastChild.textContent = count?.toLocaleString("en") ?? "";
  });
  ui.legend = entries;
}

// What the legend says: names, counts, and looks where there is one.
function legendEntries({ scene, read, layers }) {
  const { colours, data, tileSize } = scene;
  const entries = [];
  const list = (name, count, look) => entries.push({ name, count, look });
  if (layers.regions) {
    data.counts.forEach((count, i) => {
      const look = colours.looks.regions[i] ?? colours.looks.hidden;
      if (count || i < 3) list(REGION_NAMES[i], count, look);
    });
  }
  if (layers.tiles) {
    data.tiles.counts.forEach((count, i) => list(`${TILE_NAMES[i]} tiles of ${tileSize}`, count,
      colours.looks.tiles[i] ?? colours.looks.hidden));
  }
  if (layers.supervision) list("supervised slots", data.supervised, colours.looks.supervised);
  if (layers.difference && read.other) {
    const { only, first } = data.found;
    list(`only ${read.mask.name || "this mask"}`, only[0], colours.looks.difference[0]);
    list(`only ${read.other.name}`, only[1], colours.looks.difference[1]);
    list(first ? firstWords(read, first) : "the two masks are the same");
  }
  return entries;
}

function firstWords(read, { query, key }) {
  const { block, slot } = slotFacts(read, query);
  return `first at block ${block}, slot ${slot}, ${keyWords(read.mask, key)}`;
}

// The facts of a pair in the mask that is drawn.
function pairFacts({ read, scene, side }, { query, key }) {
  const other = side === "other" ? read.mask : read.other;
  const { mask, tileSize } = scene;
  return cellFacts({ ...read, mask, tileSize, other }, query, key);
}

function pairLines(ui, cell) {
  return factLines(pairFacts(ui, cell), (text) => visible(text, 24));
}

// The selected cell in words, and its two tokens in their text.
function showCard(ui) {
  const { card } = ui.parts;
  if (ui.pinned) {
    const facts = pairFacts(ui, ui.pinned);
    card.replaceChildren(
      node("h4", {}, "Selected cell", maskButton("✕", "let go (Escape)", () => select(ui, null))),
      node("p", { class: `mask-why ${facts.visible ? "seen" : ""}` }, facts.why),
      describedList(cardRows(facts)),
    );
  } else if (ui.cardOf !== null) {
    card.replaceChildren(node("h4", {}, "No cell selected"), node("p", { class: "faint" },
      "Point at a cell to read what it is and why it is visible or hidden. Click to keep it "
      + "here; arrow keys move it, Escape lets go. The wheel zooms, dragging moves, ? lists all "
      + "keys."));
  }
  ui.cardOf = ui.pinned;
  showStrip(ui);
}

function cardRows({ query, key, tile, other }) {
  const kept = (slot) => (slot.kept ? "" : ", a dummy");
  const rows = [
    ["query", `block ${query.block}, slot ${query.slot}${kept(query)}`],
    ["reads", visible(query.input, 24) + (query.kept && !query.slot ? ", the anchor" : "")],
    ["position", `${query.position}${query.kept ? `, anchor ${query.anchor}` : ""}`],
    ["predicts", query.label_position >= 0 && query.kept
      ? `token ${query.label_position} ${visible(query.label, 24)}` : "nothing"],
    ["supervised", query.supervised ? "yes" : `no: ${query.reason}`],
    ["key", key.kind === "token" ? `token ${key.token} ${visible(key.text, 24)}`
      : `block ${key.block}, slot ${key.slot}${kept(key)}`],
    key.kind === "token" ? ["document", `${key.document}`] : ["reads", visible(key.input, 24)],
    ["tile", `row ${tile.row}, column ${tile.column} of ${tile.size}: ${tile.state}`],
  ];
  return other ? [...rows, [other.name, other.why]] : rows;
}

function showStrip(ui) {
  const { strip } = ui.parts;
  const { row } = ui.scene;
  const cell = ui.hovered ?? ui.pinned;
  if (row && cell) {
    strip.replaceChildren(...stripPanes(ui, cell));
    ui.stripHint = null;
    return;
  }
  const hint = row ? "the tokens of the cell that you point at" : "the row's text is not known";
  if (hint === ui.stripHint) return;
  ui.stripHint = hint;
  strip.replaceChildren(...["key", "query"].map((name) => node("div", {},
    node("div", { class: "faint" }, `text around the ${name}: ${hint}`), node("p", {}))));
}

// The text around a cell's key, and around its query.
function stripPanes({ read, scene }, cell) {
  const { mask } = scene;
  const query = slotFacts(read, cell.query);
  const ofKey = cell.key < mask.seq_len ? null : slotFacts(read, cell.key - mask.seq_len);
  const key = ofKey ? ofKey.anchor + ofKey.slot : cell.key;
  const label = query.kept ? query.label_position : -1;
  const marks = [[key, "key"], [query.kept ? query.anchor : -1, "anchor"], [label, "label"]];
  const keyTitle = ofKey
    ? `key: where slot ${ofKey.slot} of block ${ofKey.block} stands (outlined)`
    : `key: token ${cell.key} (outlined)`;
  const aim = query.kept ? `query: anchor ${query.anchor} (bold)`
    + (label >= 0 ? `, predicts token ${label} (double line)` : "") : "query: of a dummy block";
  return [stripPane(scene, marks, keyTitle, key),
    stripPane(scene, marks, aim, query.kept ? query.anchor : 0)];
}

function stripPane({ mask, row }, marks, title, centre) {
  const first = Math.max(0, Math.min(centre, mask.seq_len - 1) - 9);
  const parts = [];
  for (let at = first; at < Math.min(mask.seq_len, first + 60); at++) {
    const kinds = marks.filter(([place]) => place === at).map(([, kind]) => kind);
    const text = row.texts[at].replace(/\n/g, "⏎").replace(/\t/g, "⇥");
    parts.push(kinds.length ? node("mark", { class: kinds.join(" "), "data-token": at },
      text.replace(/ /g, "␣")) : text);
  }
  return node("div", {}, node("div", { class: "faint" }, title),
    node("p", {}, first ? "… " : "", parts));
}

// ---- What the user does

function cellAt(ui, x, y) {
  const { box, view, scene } = ui;
  const [wide, high] = cellSizes(scene.mask, box, view.zoom);
  const key = Math.floor(view.x + (x - box.left) / wide);
  const query = Math.floor(view.y + (y - box.top) / high);
  const [right, bottom] = [box.left + box.width, box.top + box.height];
  const inside = x >= box.left && y >= box.top && x < right && y < bottom;
  return inside && exists(ui, { query, key }) ? { query, key } : null;
}

const sameCell = (one, other) => one?.query === other?.query && one?.key === other?.key;

function hover(ui, x, y) {
  const cell = ui.scene && cellAt(ui, x, y);
  const before = ui.hovered;
  ui.hovered = cell;
  ui.pointer = [x, y];
  ui.canvas.style.cursor = cell ? "crosshair" : "default";
  if (cell) ui.words.show(x, y, [...pairLines(ui, cell), ...sharedWords(ui)]);
  else ui.words.hide();
  if (ui.scene) showStrip(ui);
  if (!sameCell(before, cell)) light(ui);
}

// Where a pixel holds several cells, how many.
function sharedWords({ scene, box, view }) {
  const [wide, high] = cellSizes(scene.mask, box, view.zoom);
  const shared = Math.max(1, 1 / wide) * Math.max(1, 1 / high);
  if (shared < 2) return [];
  const about = Math.round(shared).toLocaleString("en");
  return [`This pixel holds about ${about} cells; this is the one under the pointer's centre.`];
}

function leave(ui) {
  clearTimeout(ui.still);
  const before = ui.hovered;
  ui.hovered = ui.pointer = null;
  ui.words.hide();
  if (ui.scene && before) showStrip(ui);
  if (before) light(ui);
}

function select(ui, cell, moveView = false) {
  ui.pinned = cell;
  ui.model.set("selection", cell && { query: cell.query, key: cell.key });
  ui.model.save_changes();
  if (cell && moveView) reveal(ui, cell);
  ui.say(cell ? pairLines(ui, cell).join(". ") : "no cell selected");
  showCard(ui);
  light(ui);
}

// Moves the view as little as shows a cell.
function reveal(ui, { query, key }) {
  const { box, view } = ui;
  const [wide, high] = cellSizes(ui.scene.mask, box, view.zoom);
  const moved = (from, at, room) => Math.min(at, Math.max(from, at + 1 - room));
  const to = { ...view, x: moved(view.x, key, box.width / wide),
    y: moved(view.y, query, box.height / high) };
  if (to.x !== view.x || to.y !== view.y) move(ui, to);
}

// Shows another part. Words and texts follow when the view is still: they are dearer than a frame.
function move(ui, to) {
  ui.view = withinMask(ui.scene.mask, ui.box, to);
  ui.moving = true;
  ui.base.redraw();
  if (!ui.pointer) return;
  const cell = cellAt(ui, ...ui.pointer);
  if (!sameCell(cell, ui.hovered)) ui.words.hide();
  ui.hovered = cell;
  clearTimeout(ui.still);
  ui.still = setTimeout(() => ui.pointer && hover(ui, ...ui.pointer), STILL);
}

function middle({ scene, box, view, pinned }) {
  const [wide, high] = cellSizes(scene.mask, box, view.zoom);
  const at = pinned && [(pinned.key + 0.5 - view.x) * wide, (pinned.query + 0.5 - view.y) * high];
  const inView = at && at[0] >= 0 && at[1] >= 0 && at[0] <= box.width && at[1] <= box.height;
  return inView ? at : [box.width / 2, box.height / 2];
}

function zoomBy(ui, factor, [x, y] = middle(ui)) {
  if (!ui.scene) return;
  const { scene: { mask }, box, view } = ui;
  move(ui, zoomedAt(mask, box, view, view.zoom + zoomStep(mask, box, factor), x, y));
}

function reset(ui, all) {
  if (all) {
    Object.assign(ui.layers, { regions: true, tiles: false, supervision: true, difference: true });
    ui.side = ui.parts.which.value = "mask";
    select(ui, null);
  }
  move(ui, { zoom: 0, x: 0, y: 0 });
  settle(ui);
}

function toggle(ui, name) {
  if (name === "difference" && !ui.read?.other) return;
  ui.layers[name] = !ui.layers[name];
  ui.say(`${name} ${ui.layers[name] ? "shown" : "hidden"}`);
  settle(ui);
}

function jump(ui, backwards) {
  const { scene, pinned } = ui;
  if (!scene?.data.difference) return;
  const from = pinned ?? { query: -1, key: -1 };
  const found = nextDifference(scene.data.difference, from.query, from.key, backwards);
  if (!found) return ui.say("the two masks are the same");
  ui.layers.difference = true;
  select(ui, { query: found.query, key: found.key }, true);
  settle(ui);
}

function focusOn(ui, cell) {
  const { scene: { mask }, box, view } = ui;
  const target = 26;
  const [wide] = cellSizes(mask, box, 0);
  const zoom = Math.max(view.zoom, Math.log(target / wide) / Math.log(LARGEST_CELL / wide));
  const [w, h] = cellSizes(mask, box, zoom);
  move(ui, { zoom, x: cell.key + 0.5 - box.width / w / 2,
    y: cell.query + 0.5 - box.height / h / 2 });
}

function showHelp({ parts: { help, ask } }, open) {
  help.hidden = !open;
  ask.setAttribute("aria-expanded", open);
}

// ---- Keys

// By how many queries and keys a key moves the selection.
function keyStep(event, block) {
  return {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    PageUp: [-block, 0], PageDown: [block, 0],
  }[event.key];
}

const KEY_CALLS = {
  "+": (ui) => zoomBy(ui, 1.5), "=": (ui) => zoomBy(ui, 1.5),
  "-": (ui) => zoomBy(ui, 1 / 1.5), _: (ui) => zoomBy(ui, 1 / 1.5),
  0: (ui) => reset(ui, false),
  Enter: (ui) => (ui.pinned ? focusOn(ui, ui.pinned) : false),
  n: (ui) => jump(ui, false), p: (ui) => jump(ui, true), N: (ui) => jump(ui, true),
  "?": (ui) => showHelp(ui, ui.parts.help.hidden),
  Escape: letGo,
};

function press(ui, event) {
  if (!ui.scene || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = keyStep(event, ui.scene.mask.block_size);
  const layer = Object.keys(ui.layers)[event.key - 1];
  if (step && event.shiftKey) slide(ui, step);
  else if (step) stepBy(ui, step);
  else if (layer) toggle(ui, layer);
  // A call that has nothing to do leaves the key to the page.
  else if (!Object.hasOwn(KEY_CALLS, event.key) || KEY_CALLS[event.key](ui) === false) return;
  event.preventDefault();
  event.stopPropagation();
}

function slide(ui, [down, across]) {
  const [wide, high] = cellSizes(ui.scene.mask, ui.box, ui.view.zoom);
  move(ui, { ...ui.view, x: ui.view.x + across * 60 / wide, y: ui.view.y + down * 60 / high });
}

// Moves the selection, which begins in the middle of the view.
function stepBy(ui, [down, across]) {
  const { scene: { mask }, box, view, pinned } = ui;
  const [wide, high] = cellSizes(mask, box, view.zoom);
  const middle = { query: Math.floor(view.y + box.height / high / 2),
    key: Math.floor(view.x + box.width / wide / 2) };
  const within = (at, count) => Math.max(0, Math.min(at, count - 1));
  const from = pinned ?? { query: middle.query - down, key: middle.key - across };
  select(ui, { query: within(from.query + down, mask.queries),
    key: within(from.key + across, mask.keys) }, true);
}

function letGo(ui) {
  if (!ui.parts.help.hidden) return showHelp(ui, false);
  leave(ui);
  return select(ui, null);
}

// ---- Pointers

// Listens to pointers and keys; returns what ends that outside of the widget.
function listen(ui) {
  const { canvas, parts } = ui;
  const handlers = { pointerdown: down, pointermove: drag, pointerup: up, pointercancel: up,
    pointerleave: leave, keydown: press, dblclick: twice };
  for (const [name, call] of Object.entries(handlers)) {
    canvas.addEventListener(name, (event) => call(ui, event));
  }
  canvas.addEventListener("wheel", (event) => wheel(ui, event), { passive: false });
  parts.help.addEventListener("keydown", (event) => press(ui, event));
  canvas.setAttribute("tabindex", 0);
  canvas.setAttribute("role", "application");
  ui.marks.canvas.setAttribute("aria-hidden", "true");
  // Where the page scrolls under a pointer that rests, its wheel is not taken.
  const watch = (event) => {
    if (parts.stage.contains(event.composedPath()[0])) return;
    ui.outside = { x: event.screenX, y: event.screenY };
  };
  window.addEventListener("wheel", watch, { capture: true, passive: true });
  return () => window.removeEventListener("wheel", watch, { capture: true });
}

function wheel(ui, event) {
  if (!ui.scene) return;
  const { box, view, outside } = ui;
  if (event.screenX === outside.x && event.screenY === outside.y && !event.ctrlKey) return;
  const unit = event.deltaMode === 1 ? 33 : 1;
  ui.pointer = [event.offsetX, event.offsetY];
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    const [wide] = cellSizes(ui.scene.mask, box, view.zoom);
    move(ui, { ...view, x: view.x + (event.deltaX || event.deltaY) * unit / wide });
  } else {
    // At its limit the mask lets the page scroll, but not in the middle of a gesture.
    const out = event.deltaY > 0 && view.zoom === 0 && event.timeStamp - ui.lastZoom > 400;
    if (out && !event.ctrlKey) return;
    ui.lastZoom = event.timeStamp;
    const factor = Math.exp(-event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.003));
    zoomBy(ui, factor, [event.offsetX - box.left, event.offsetY - box.top]);
  }
  event.preventDefault();
}

function placeOf({ canvas }, event) {
  const { left, top } = canvas.getBoundingClientRect();
  return { x: event.clientX - left, y: event.clientY - top };
}

function down(ui, event) {
  if (event.button) return;
  ui.start = placeOf(ui, event);
  ui.pointers.set(event.pointerId, ui.start);
  // A pointer that no longer exists cannot be held.
  try { ui.canvas.setPointerCapture(event.pointerId); } catch { /* it is not held */ }
  ui.dragged = ui.pointers.size > 1;
}

function drag(ui, event) {
  const at = placeOf(ui, event);
  ui.outside = { x: NaN, y: NaN };
  const before = ui.pointers.get(event.pointerId);
  if (!before) return hover(ui, at.x, at.y);
  if (ui.pointers.size > 1) pinch(ui, event.pointerId, before, at);
  else if (!pull(ui, before, at)) return;
  ui.pointers.set(event.pointerId, at);
}

// Moves the view with one pointer; false while it has hardly moved, as in a click.
function pull(ui, before, at) {
  if (!ui.dragged && Math.hypot(at.x - ui.start.x, at.y - ui.start.y) < 4) return false;
  if (!ui.dragged) leave(ui);
  ui.dragged = true;
  ui.canvas.style.cursor = "grabbing";
  shift(ui, at.x - before.x, at.y - before.y);
  return true;
}

// Moves and zooms with two pointers.
function pinch(ui, pointer, before, at) {
  const other = [...ui.pointers].find(([id]) => id !== pointer)[1];
  const apart = (one) => Math.max(10, Math.hypot(one.x - other.x, one.y - other.y));
  const centre = { x: (at.x + other.x) / 2, y: (at.y + other.y) / 2 };
  const was = { x: (before.x + other.x) / 2, y: (before.y + other.y) / 2 };
  shift(ui, centre.x - was.x, centre.y - was.y);
  zoomBy(ui, apart(at) / apart(before), [centre.x - ui.box.left, centre.y - ui.box.top]);
}

// Moves the view by pixels.
function shift(ui, across, down) {
  const { view } = ui;
  const [wide, high] = cellSizes(ui.scene.mask, ui.box, view.zoom);
  move(ui, { ...view, x: view.x - across / wide, y: view.y - down / high });
}

function up(ui, event) {
  if (!ui.pointers.delete(event.pointerId)) return;
  const at = placeOf(ui, event);
  const cell = ui.scene && !ui.dragged && event.type === "pointerup" && cellAt(ui, at.x, at.y);
  if (cell) select(ui, cell);
  ui.canvas.style.cursor = "crosshair";
}

function twice(ui, event) {
  const cell = ui.scene && cellAt(ui, event.offsetX, event.offsetY);
  if (cell) focusOn(ui, cell);
}

// ---- Small parts

// A small picture of a look, its stripes included. A canvas would be a layer of the page, put
// together anew in each frame.
function swatch(look) {
  if (look.picture === undefined) {
    const canvas = node("canvas", { width: 32, height: 24 });
    const pen = canvas.getContext("2d");
    pen.scale(2, 2);
    for (const fill of [look.colour, look.hatch]) {
      if (!fill) continue;
      pen.fillStyle = fill;
      pen.fillRect(0, 0, 16, 12);
    }
    look.picture = canvas.toDataURL();
  }
  return node("img", { src: look.picture, alt: "" });
}

function describedList(pairs) {
  const entry = ([name, text]) => [node("dt", {}, name), node("dd", {}, text)];
  return node("dl", {}, pairs.flatMap(entry));
}

function keyWords(mask, key) {
  if (key < mask.seq_len) return `token ${key}`;
  const query = key - mask.seq_len;
  return `block ${blockOf(mask, query)}, slot ${slotOf(mask, query)}`;
}

export default { render };
