// How the mask is painted on a canvas: queries down, keys across, from one cell to 131,072 tokens.
//
// What the mask is says rule.js. Here each layer is a list of rectangles; a frame draws those in
// view one by one, or where too many share a line of the screen, adds up their shares of pixels.
// A frame looks for what is in view by bisection, so that its time follows the screen, not the row.

const LARGEST_CELL = 220; // Pixels: then a cell has room for the reason why it is hidden.
const ROOM_FOR_NAMES = 10;
const NAME_FONT = "10px ui-monospace, Menlo, Consolas, monospace";
const SMALL_FONT = "11px sans-serif";
const TITLE_FONT = "600 12px sans-serif";
const FLAG_FONT = "600 11px sans-serif";
// What stands above the plot: titles, documents where there are several, and names or numbers.
const [TITLES, DOCUMENTS, NAMES, NUMBERS] = [20, 15, 58, 28];

// ---- Places: cells of the mask, and pixels of the plot

// How many pixels a key and a query take at a zoom between 0, the whole mask, and 1, a large cell.
// Whole masks of few cells fill the plot, unless cells would be more than twice as wide as high.
function cellSizes(mask, box, zoom) {
  const [wide, high] = [box.width / mask.keys, box.height / mask.queries];
  const whole = Math.min(wide, high) < 6 ? [wide, high]
    : [Math.min(wide, 2 * high), Math.min(high, 2 * wide)];
  return whole.map((size) => {
    const least = Math.min(size, 40);
    return least * (LARGEST_CELL / least) ** zoom;
  });
}

// The view, so that it shows the mask and not what is beside it.
function withinMask(mask, box, view) {
  const [wide, high] = cellSizes(mask, box, view.zoom);
  const within = (at, cells, room) => Math.max(0, Math.min(at, cells - room));
  return {
    zoom: view.zoom,
    x: within(view.x, mask.keys, box.width / wide),
    y: within(view.y, mask.queries, box.height / high),
  };
}

// The view at another zoom that leaves what lies under a pixel of the plot where it is.
function zoomedAt(mask, box, view, zoom, px, py) {
  const next = Math.max(0, Math.min(1, zoom));
  const [before, after] = [cellSizes(mask, box, view.zoom), cellSizes(mask, box, next)];
  return withinMask(mask, box, {
    zoom: next,
    x: view.x + px / before[0] - px / after[0],
    y: view.y + py / before[1] - py / after[1],
  });
}

// By how much the zoom grows when cells become `factor` times as wide.
function zoomStep(mask, box, factor) {
  const [wide] = cellSizes(mask, box, 0);
  return Math.log(factor) / Math.log(LARGEST_CELL / wide);
}

// The first number of 1, 2, 5, 10, 20 ... of which that many pixels hold `room`.
function roundStep(pixels, room) {
  for (let ten = 1; ; ten *= 10) {
    for (const step of [ten, 2 * ten, 5 * ten]) if (step * pixels >= room) return step;
  }
}

// ---- Layers: rectangles [query, past query, key, past key, kind] ..., by query

// All touched tiles, each run of equal ones as one rectangle, and how many there are of each state.
function tileRectangles(mask, size) {
  const rows = Math.ceil(mask.queries / size);
  const counts = [rows * Math.ceil(mask.keys / size), 0, 0];
  const found = [];
  for (let row = 0; row < rows; row++) {
    const runs = tileRow(mask, size, row);
    const past = Math.min(mask.queries, (row + 1) * size);
    for (let i = 0; i < runs.length; i += 3) {
      const [first, last, state] = [runs[i], runs[i + 1], runs[i + 2]];
      counts[state] += last - first;
      counts[0] -= last - first;
      found.push(row * size, past, first * size, Math.min(mask.keys, last * size), state);
    }
  }
  return { found: Int32Array.from(found), counts };
}

// Where, in a list of rectangles, the first lies that reaches behind a query.
function firstBehind(rectangles, query) {
  let [low, high] = [0, rectangles.length / 5];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (rectangles[5 * middle + 1] <= query) low = middle + 1;
    else high = middle;
  }
  return 5 * low;
}

// The layers in view as [rectangles, looks], the lowest first.
function layersOf({ colours, layers, data }) {
  const compared = layers.difference && data.difference;
  const shown = [];
  const show = (name, rectangles, alpha) => shown.push({
    rectangles, looks: colours.looks[name].map((look) => look && { ...look, alpha }),
  });
  if (layers.regions) {
    show("regions", data.regions, compared ? 0.28 : layers.tiles ? 0.4 : 1);
  }
  if (layers.tiles) show("tiles", data.tiles.found, compared ? 0.3 : 0.85);
  if (compared) show("difference", data.difference, 1);
  return shown;
}

// ---- Colours

// Stripes to fill with, so that colour is never the only sign: "/", "\", "x" or ".".
function stripes(context, kind, colour) {
  const tile = node("canvas", { width: 8, height: 8 });
  const pen = tile.getContext("2d");
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = 1.4;
  if (kind === ".") {
    for (const at of [2, 6]) pen.fillRect(at - 0.8, at - 0.8, 1.6, 1.6);
  } else {
    for (const shift of [-8, 0, 8]) {
      if (kind !== "\\") pen.moveTo(shift - 2, 10), pen.lineTo(shift + 10, -2);
      if (kind !== "/") pen.moveTo(shift - 2, -2), pen.lineTo(shift + 10, 10);
    }
    pen.stroke();
  }
  return context.createPattern(tile, "repeat");
}

// The colours of a theme as the mask uses them, and its stripes. Where pixels are shared, no part
// of a look is fainter than `least`; `slope` says how stripes run there, and where they are `thin`,
// areas too narrow for stripes are broken by them.
function maskColours(el, context) {
  const colours = palette(el);
  const { paper, ink } = colours;
  const look = (colour, least, kind, more = {}) =>
    ({ colour, least, hatch: kind && stripes(context, kind, paper), ...more });
  const looks = {
    regions: [null, look(colours.context, 0.12), look(colours.own, 0.45, "."),
      look(colours.dummy, 0.45, "x")],
    tiles: [null, look(colours.partial, 0.3, "/"), look(colours.full, 0.3)],
    difference: [look(colours.onlyHere, 0.5, "/", { slope: 1 }),
      look(colours.onlyThere, 0.5, "\\", { slope: -1, thin: true })],
    supervised: look(colours.accepted), hidden: look(mixed(ink, paper, 0.05)),
  };
  return { ...colours, ground: looks.hidden.colour, veil: mixed(ink, paper, 0.12),
    track: mixed(ink, paper, 0.15), looks };
}

// ---- The plot

// The mask with its axes; `scene` holds all that is to be seen. Paper is laid first.
function paintMask(context, scene, box, view) {
  const { mask, colours } = scene;
  const sizes = cellSizes(mask, box, view.zoom);
  const width = Math.min(box.width, (mask.keys - view.x) * sizes[0]);
  const height = Math.min(box.height, (mask.queries - view.y) * sizes[1]);
  const part = { ...box, width, height };
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.save();
  context.beginPath();
  context.rect(box.left, box.top, width, height);
  context.clip();
  paintLayers(context, scene, part, view, sizes);
  if (scene.layers.supervision) paintUnsupervised(context, scene, part, view, sizes);
  paintLines(context, scene, part, view, sizes);
  if (sizes[0] > 110 && sizes[1] > 60) paintReasons(context, scene, part, view, sizes);
  context.restore();
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.strokeRect(box.left - 0.5, box.top - 0.5, width + 1, height + 1);
  paintKeys(context, scene, part, view, sizes);
  paintQueries(context, scene, part, view, sizes);
  paintBars(context, scene, box, view, sizes);
}

function paintLayers(context, scene, box, view, sizes) {
  const { mask, colours, layers, data, tileSize } = scene;
  const shown = layersOf(scene);
  if (!manyShare(context, shown, box, view, sizes, mask.block_size)) {
    context.fillStyle = colours.ground;
    context.fillRect(box.left, box.top, box.width, box.height);
    for (const layer of shown) paintRectangles(context, layer, box, view, sizes);
    return;
  }
  paintShares(context, shown, box, view, sizes, colours);
  // Tiles may be large where queries are not: they keep their stripes.
  if (layers.tiles && tileSize * Math.min(...sizes) > 6) {
    const looks = colours.looks.tiles.map((look) => look?.hatch && { ...look, alpha: 0 });
    paintRectangles(context, { rectangles: data.tiles.found, looks }, box, view, sizes);
  }
}

// Whether so many rectangles share the lines of the screen that they are not drawn one by one.
function manyShare(context, layers, box, view, [, high], blockSize) {
  const ratio = context.getTransform().a;
  if (blockSize * high * ratio < 4) return true;
  const past = view.y + box.height / high;
  return layers.some(({ rectangles }) =>
    firstBehind(rectangles, past) - firstBehind(rectangles, view.y) > 5 * 4 * box.height * ratio);
}

// Draws the rectangles in view one by one, each at least a pixel wide and high.
function paintRectangles(context, layer, box, view, [wide, high]) {
  const { rectangles, looks } = layer;
  const past = view.y + box.height / high;
  const pastKey = view.x + box.width / wide;
  const least = 1 / context.getTransform().a;
  const snap = (at) => Math.round(at / least) * least;
  for (let i = firstBehind(rectangles, view.y); i < rectangles.length; i += 5) {
    if (rectangles[i] >= past) break;
    const look = looks[rectangles[i + 4]];
    if (!look || rectangles[i + 2] >= pastKey || rectangles[i + 3] <= view.x) continue;
    const left = snap(box.left + (Math.max(rectangles[i + 2], view.x - 1) - view.x) * wide);
    const right = snap(box.left + (Math.min(rectangles[i + 3], pastKey + 1) - view.x) * wide);
    const top = snap(box.top + (Math.max(rectangles[i], view.y - 1) - view.y) * high);
    const bottom = snap(box.top + (Math.min(rectangles[i + 1], past + 1) - view.y) * high);
    const [across, down] = [Math.max(least, right - left), Math.max(least, bottom - top)];
    fillLook(context, look, left, top, across, down);
  }
  context.globalAlpha = 1;
}

function fillLook(context, look, left, top, across, down) {
  context.globalAlpha = look.alpha;
  context.fillStyle = look.colour;
  context.fillRect(left, top, across, down);
  const wideEnough = look.thin ? Math.max(across, down) > 8 : across > 5 && down > 5;
  if (!look.hatch || !wideEnough) return;
  context.globalAlpha = 1;
  context.fillStyle = look.hatch;
  context.fillRect(left, top, across, down);
}

// ---- Shared pixels

// Draws layers in which each pixel holds many queries: its colour is the mean of its cells', but of
// what is rarer than `least` no fainter than that, so that a thin line is not lost.
function paintShares(context, layers, box, view, sizes, colours) {
  const ratio = context.getTransform().a;
  const width = Math.round(box.width * ratio);
  const height = Math.round(box.height * ratio);
  const sheet = sheetOf(context, width, height);
  const scale = { wide: sizes[0] * ratio, high: sizes[1] * ratio, x: view.x, width };
  const prepared = layers.map(({ rectangles, looks }) => ({
    rectangles, from: firstBehind(rectangles, view.y),
    looks: looks.map((look) => look && sharedLook(look, sheet, ratio)),
  }));
  const looks = prepared.flatMap((layer) => layer.looks.filter(Boolean));
  const ground = channels(colours.ground);
  sheet.used = 0;
  for (let line = 0; line < height; line++) {
    const query = view.y + line / scale.high;
    startLine(sheet);
    for (const layer of prepared) addShares(sheet, layer, query, query + 1 / scale.high, scale);
    fillLine(sheet, looks, ground, line);
    if (sheet.runs.length) stripeLine(sheet, ground, line);
  }
  context.putImageData(sheet.image, Math.round(box.left * ratio), Math.round(box.top * ratio));
}

// What a canvas needs for its pixels, once for all frames: new ones would be much to throw away.
const SHEETS = new WeakMap();
function sheetOf(context, width, height) {
  const known = SHEETS.get(context);
  if (known && known.image.width === width && known.image.height === height) return known;
  const image = context.createImageData(width, height);
  const sheet = {
    image, width, pixels: new Uint32Array(image.data.buffer),
    // The places of a line where something begins or ends, and in which line each was last one.
    places: new Int32Array(width + 2), count: 0, seen: new Int32Array(width + 2), line: 0,
    // For each look what is added at each place; areas to be striped as [look, from, to] ...
    edges: [], used: 0, runs: [],
  };
  SHEETS.set(context, sheet);
  return sheet;
}

function sharedLook(look, sheet, ratio) {
  const edges = sheet.edges[sheet.used] ??= new Float64Array(sheet.width + 2);
  sheet.used += 1;
  return { ...look, channels: channels(look.colour), edges, sum: 0, began: -1,
    period: Math.round(8 * ratio), stripe: Math.round(2 * ratio), wide: 4 * ratio };
}

function startLine(sheet) {
  sheet.line += 1;
  sheet.count = 0;
  sheet.runs.length = 0;
}

// Adds what a layer shows between two queries: summed along the line, the edges of a look give each
// pixel the part of it that is inside.
function addShares(sheet, layer, query, past, { wide, high, x, width }) {
  const { rectangles, looks } = layer;
  while (layer.from < rectangles.length && rectangles[layer.from + 1] <= query) layer.from += 5;
  for (let i = layer.from; i < rectangles.length && rectangles[i] < past; i += 5) {
    const look = looks[rectangles[i + 4]];
    if (!look) continue;
    const share = (Math.min(past, rectangles[i + 1]) - Math.max(query, rectangles[i])) * high;
    const start = Math.max(0, (rectangles[i + 2] - x) * wide);
    const end = Math.min(width, (rectangles[i + 3] - x) * wide);
    if (start >= end) continue;
    addEdge(sheet, look.edges, start, share);
    addEdge(sheet, look.edges, end, -share);
  }
}

function addEdge(sheet, edges, at, share) {
  const first = Math.floor(at);
  for (let place = first; place < first + 2; place++) {
    const part = place === first ? 1 - at + first : at - first;
    if (part === 0) continue;
    edges[place] += share * part;
    if (sheet.seen[place] === sheet.line) continue;
    sheet.seen[place] = sheet.line;
    sheet.places[sheet.count++] = place;
  }
}

// Between two places a line has one colour.
function fillLine(sheet, looks, ground, line) {
  const { places, count, pixels, width } = sheet;
  places.subarray(0, count).sort();
  const first = line * width;
  let [at, colour] = [0, packed(ground)];
  for (let i = 0; i < count; i++) {
    const place = places[i];
    if (place > at) pixels.fill(colour, first + at, first + Math.min(place, width));
    at = place;
    for (const look of looks) stepLook(sheet, look, place);
    if (place < width) colour = blended(looks, ground);
  }
  if (at < width) pixels.fill(colour, first + at, first + width);
  for (const look of looks) endRun(sheet, look, width);
}

function stepLook(sheet, look, place) {
  const { edges } = look;
  if (!edges[place]) return;
  look.sum += edges[place];
  edges[place] = 0;
  // What fractions leave of their sum is nothing.
  if (look.sum < 1e-4) endRun(sheet, look, place);
  else if (look.began < 0) look.began = place;
}

function endRun(sheet, look, place) {
  if (look.slope && look.began >= 0) sheet.runs.push(look, look.began, place);
  look.began = -1;
  look.sum = 0;
}

function blended(looks, ground) {
  let [red, green, blue] = ground;
  for (const { sum, alpha, least, channels: [r, g, b] } of looks) {
    if (sum === 0) continue;
    const share = alpha * (sum > least ? Math.min(sum, 1) : least);
    red += share * (r - red);
    green += share * (g - green);
    blue += share * (b - blue);
  }
  return packed([red, green, blue]);
}

function packed([red, green, blue]) {
  return 0xff000000 | (blue << 16) | (green << 8) | red;
}

// Stripes of the ground through the line's areas that have a slope.
function stripeLine({ runs, pixels, width }, ground, line) {
  const colour = packed(ground);
  for (let i = 0; i < runs.length; i += 3) {
    const { slope, thin, period, stripe, wide } = runs[i];
    if (!thin && runs[i + 2] - runs[i + 1] < wide) continue;
    const shift = slope * line;
    for (let x = runs[i + 1]; x < Math.min(runs[i + 2], width); x++) {
      if ((((x + shift) % period) + period) % period < stripe) pixels[line * width + x] = colour;
    }
  }
}

// ---- What lies on the layers

// The blocks in view, as [first, past].
function blocksInView(mask, box, view, high) {
  const past = Math.ceil((view.y + box.height / high) / mask.block_size);
  return [blockOf(mask, Math.floor(view.y)), Math.min(mask.blocks, past)];
}

// Where the supervised slots of a block begin and end, as queries.
function supervisedOf({ mask, blocks }, block) {
  const from = block * mask.block_size + (mask.layout === "anchor_given" ? 1 : 0);
  return [from, from + (mask.keep[block] ? blocks.supervised[block] : 0)];
}

// Veils the queries that are not supervised.
function paintUnsupervised(context, scene, box, view, [, high]) {
  const { mask, colours } = scene;
  context.fillStyle = colours.veil;
  context.globalAlpha = 0.62;
  let drawn = -1;
  const veil = (from, past) => {
    const top = box.top + (from - view.y) * high;
    const bottom = box.top + (past - view.y) * high;
    // Where many blocks share a pixel, one of them speaks for it.
    if (from === past || bottom < drawn + 0.5) return;
    context.fillRect(box.left, top, box.width, bottom - top);
    drawn = bottom;
  };
  const [begin, end] = blocksInView(mask, box, view, high);
  for (let block = begin; block < end; block++) {
    const [from, past] = supervisedOf(scene, block);
    veil(block * mask.block_size, from);
    veil(past, (block + 1) * mask.block_size);
  }
  context.globalAlpha = 1;
}

// Lines between cells, tiles, blocks and documents, each kind where it has room.
function paintLines(context, { mask, colours, layers, tileSize }, box, view, sizes) {
  const least = 1 / context.getTransform().a;
  const small = Math.min(...sizes);
  const lines = (step, colour, alpha, width, from = 0) => {
    context.globalAlpha = alpha;
    context.strokeStyle = colour;
    context.lineWidth = width;
    strokeGrid(context, box, view, sizes, step, from, least);
  };
  if (small >= 5) lines(1, colours.paper, Math.min(1, small / 14), small > 10 ? 1 : least);
  if (small * mask.block_size >= 12) lines(mask.block_size, colours.ink, 0.45, 1, mask.seq_len);
  if (layers.tiles && small * tileSize >= 7) {
    lines(tileSize, colours.ink, 0.5, small * tileSize > 60 ? 2 : 1);
  }
  context.globalAlpha = 1;
  context.strokeStyle = colours.ink;
  paintDocumentLines(context, mask, box, view, sizes[0]);
  const seam = box.left + (mask.seq_len - view.x) * sizes[0];
  context.lineWidth = 2;
  drawLine(context, seam, box.top, seam, box.top + box.height);
}

// Lines at every `step` queries, and from a key on at every `step` keys.
function strokeGrid(context, { left, top, width, height }, view, [wide, high], step, from, least) {
  const x = (key) => Math.round((left + (key - view.x) * wide) / least + 0.5) * least;
  const y = (query) => Math.round((top + (query - view.y) * high) / least + 0.5) * least;
  context.beginPath();
  const begin = Math.max(from, from + Math.ceil((view.x - from) / step) * step);
  for (let at = begin; at <= view.x + width / wide; at += step) {
    context.moveTo(x(at), top);
    context.lineTo(x(at), top + height);
  }
  for (let at = Math.ceil(view.y / step) * step; at <= view.y + height / high; at += step) {
    context.moveTo(left, y(at));
    context.lineTo(left + width, y(at));
  }
  context.stroke();
}

function paintDocumentLines(context, { documents }, box, view, wide) {
  const first = lastAtMost(documents, view.x) + 1;
  const past = lastAtMost(documents, view.x + box.width / wide) + 1;
  // Lines of more documents would hide all else.
  if ((past - first) * 12 > box.width) return;
  context.setLineDash([4, 4]);
  context.lineWidth = 1;
  for (let i = Math.max(1, first); i < past; i++) {
    const x = Math.round(box.left + (documents[i] - view.x) * wide) + 0.5;
    drawLine(context, x, box.top, x, box.top + box.height);
  }
  context.setLineDash([]);
}

function drawLine(context, x, y, toX, toY) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

// In cells as large as a card: why they are visible or hidden.
function paintReasons(context, { mask, colours }, box, view, [wide, high]) {
  context.font = SMALL_FONT;
  context.textAlign = "left";
  context.textBaseline = "top";
  const past = Math.min(mask.queries, view.y + box.height / high);
  const pastKey = Math.min(mask.keys, view.x + box.width / wide);
  for (let query = Math.floor(view.y); query < past; query++) {
    for (let key = Math.floor(view.x); key < pastKey; key++) {
      const left = box.left + (key - view.x) * wide + 6;
      const top = box.top + (query - view.y) * high + 6;
      const lines = wrapped(context, why(mask, query, key), wide - 20);
      const room = Math.max(...lines.map((line) => textWidth(context, SMALL_FONT, line)));
      context.fillStyle = colours.paper;
      context.fillRect(left - 2, top - 2, room + 8, lines.length * 14 + 4);
      context.fillStyle = colours.ink;
      lines.forEach((line, i) => context.fillText(line, left + 2, top + 14 * i));
    }
  }
}

// A sentence as lines of at most a width.
function wrapped(context, sentence, width) {
  const lines = [""];
  for (const word of sentence.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (textWidth(context, SMALL_FONT, longer) <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

// How wide a text is, measured once: that is dearer than to draw it. The font is the present one.
const TEXT_WIDTHS = new Map();
function textWidth(context, font, text) {
  const name = `${font} ${text}`;
  let width = TEXT_WIDTHS.get(name);
  if (width === undefined) {
    if (TEXT_WIDTHS.size > 4000) TEXT_WIDTHS.clear();
    width = context.measureText(text).width;
    TEXT_WIDTHS.set(name, width);
  }
  return width;
}

// ---- The axes

// How much room the keys' axis needs above the plot.
function roomAbove(mask, wide) {
  return TITLES + (mask.documents.length > 1 ? DOCUMENTS : 0)
    + (wide >= ROOM_FOR_NAMES ? NAMES : NUMBERS);
}

// Above the plot: what lies there, the documents, and the tokens' names or numbers.
function paintKeys(context, scene, box, view, [wide]) {
  const { mask } = scene;
  const at = (key) => box.left + (key - view.x) * wide;
  const seam = Math.max(box.left, Math.min(box.left + box.width, at(mask.seq_len)));
  context.save();
  context.textBaseline = "middle";
  paintTitles(context, scene, box, seam);
  if (mask.documents.length > 1) paintDocuments(context, scene, box, view, at);
  if (wide >= ROOM_FOR_NAMES) paintKeyNames(context, scene, box, view, at, wide);
  else paintKeyNumbers(context, scene, box, view, at, wide, seam);
  if (scene.layers.supervision && scene.row) paintLabels(context, scene, box, view, at);
  context.restore();
}

function paintTitles(context, { mask, colours }, box, seam) {
  const counted = (number) => number.toLocaleString("en");
  const titles = [
    [box.left, seam, [`keys: ${counted(mask.seq_len)} context tokens`, "context"]],
    [seam, box.left + box.width, [`${counted(mask.queries)} slots: ${counted(mask.blocks)} blocks `
      + `of ${mask.block_size}`, "slots"]],
  ];
  context.font = TITLE_FONT;
  context.fillStyle = colours.ink;
  context.textAlign = "center";
  for (const [left, right, texts] of titles) {
    const text = texts.find((one) => textWidth(context, TITLE_FONT, one) < right - left - 6);
    if (!text) continue;
    context.fillText(text, (left + right) / 2, 9);
    context.fillRect(left + 2, 17, right - left - 4, 1);
  }
}

function paintDocuments(context, { mask, colours }, box, view, at) {
  const { documents } = mask;
  const end = box.left + box.width;
  context.font = SMALL_FONT;
  context.fillStyle = colours.faint;
  context.textAlign = "center";
  for (let i = Math.max(0, lastAtMost(documents, view.x)); i < documents.length; i++) {
    const left = Math.max(box.left, at(documents[i]));
    if (left >= end) break;
    const right = Math.min(end, at(documents[i + 1] ?? mask.seq_len));
    // No number is narrower than that.
    if (right - left < 10) continue;
    const text = documents[i] >= mask.length ? "padding" : `document ${i}`;
    const fits = (one) => textWidth(context, SMALL_FONT, one) < right - left - 4;
    const shown = [text, String(i)].find(fits);
    if (shown) context.fillText(shown, (left + right) / 2, TITLES + 7);
  }
}

function paintKeyNames(context, { mask, row, colours }, box, view, at, wide) {
  const past = Math.min(mask.keys, view.x + box.width / wide);
  context.font = NAME_FONT;
  context.textAlign = "left";
  context.fillStyle = colours.ink;
  for (let key = Math.floor(view.x); key < past; key++) {
    const x = at(key + 0.5);
    if (x < box.left || x > box.left + box.width) continue;
    context.save();
    context.translate(x, box.top - 6);
    context.rotate(-Math.PI / 2);
    context.fillText(keyName(mask, row, key, 8), 0, 0);
    context.restore();
  }
}

function paintKeyNumbers(context, { mask, colours }, box, view, at, wide, seam) {
  const end = Math.min(mask.seq_len, view.x + box.width / wide);
  const step = roundStep(wide, 64);
  context.font = SMALL_FONT;
  context.textAlign = "center";
  for (let key = Math.ceil(view.x / step) * step; key < end; key += step) {
    const x = at(key + 0.5);
    // Beside the seam stands the number of the first block.
    if (x > seam - 46 && seam < box.left + box.width) break;
    paintTick(context, x, box.top, key.toLocaleString("en"), colours);
  }
  const ofBlocks = roundStep(wide * mask.block_size, 64);
  const first = Math.max(0, Math.floor((view.x - mask.seq_len) / mask.block_size));
  for (let b = Math.ceil(first / ofBlocks) * ofBlocks; b < mask.blocks; b += ofBlocks) {
    const x = at(mask.seq_len + b * mask.block_size);
    if (x > box.left + box.width) break;
    if (x >= box.left) paintTick(context, x, box.top, `b${b.toLocaleString("en")}`, colours);
  }
}

function paintTick(context, x, y, text, colours) {
  context.fillStyle = colours.line;
  context.fillRect(Math.round(x), y - 11, 1, 6);
  context.fillStyle = colours.ink;
  context.fillText(text, x, y - 19);
}

// A band of the tokens that are supervised, at the edge of the plot.
function paintLabels(context, { row: { labels }, colours }, box, view, at) {
  context.fillStyle = colours.accepted;
  const end = box.left + box.width;
  let drawn = -1;
  // The borders of runs, one behind the other: an even one begins a run.
  const first = Math.max(0, lastAtMost(labels, view.x));
  for (let i = first - (first % 2); i < labels.length; i += 2) {
    const left = Math.max(box.left, at(labels[i]), drawn);
    const right = Math.min(end, at(labels[i + 1]));
    if (left >= end) break;
    if (right <= left) continue;
    context.fillRect(left, box.top - 4, Math.max(0.7, right - left), 3);
    drawn = right;
  }
}

// On the left: the slots' names, or the numbers of the blocks; which slots are supervised.
function paintQueries(context, scene, box, view, [, high]) {
  const { colours } = scene;
  const edge = box.left - 14;
  context.save();
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillStyle = colours.ink;
  if (high >= ROOM_FOR_NAMES) paintQueryNames(context, scene, box, view, high, edge);
  else paintBlockNumbers(context, scene, box, view, high, edge);
  context.font = TITLE_FONT;
  context.fillText("queries", edge, box.top - 12);
  if (scene.layers.supervision) paintSupervised(context, scene, box, view, high);
  context.restore();
}

function paintQueryNames(context, scene, box, view, high, edge) {
  const past = Math.min(scene.mask.queries, view.y + box.height / high);
  context.font = NAME_FONT;
  for (let query = Math.floor(view.y); query < past; query++) {
    const y = box.top + (query + 0.5 - view.y) * high;
    if (y < box.top || y > box.top + box.height) continue;
    context.fillText(queryName(scene, query, 8), edge, y);
  }
}

function paintBlockNumbers(context, { mask }, box, view, high, edge) {
  const past = Math.min(mask.queries, view.y + box.height / high);
  const step = roundStep(high * mask.block_size, 24);
  const first = Math.floor(view.y / mask.block_size / step) * step;
  context.font = SMALL_FONT;
  for (let block = first; block * mask.block_size < past; block += step) {
    const y = box.top + (block * mask.block_size - view.y) * high;
    if (y < box.top - 1) continue;
    context.fillText(`block ${block.toLocaleString("en")}`, edge - 2, y + 6);
    context.fillRect(edge + 1, Math.round(y), 4, 1);
  }
}

function paintSupervised(context, scene, box, view, high) {
  context.fillStyle = scene.colours.accepted;
  const bar = (top, bottom) => context.fillRect(box.left - 7, top, 4, Math.max(0.5, bottom - top));
  const end = box.top + box.height;
  const gap = high > 6 ? 1 : 0;
  // Bars with less than a pixel between them are one.
  let [begun, drawn] = [0, -1];
  const [begin, past] = blocksInView(scene.mask, box, view, high);
  for (let block = begin; block < past; block++) {
    const [from, to] = supervisedOf(scene, block);
    const top = Math.max(box.top, box.top + (from - view.y) * high);
    const bottom = Math.min(end, box.top + (to - view.y) * high) - gap;
    if (bottom <= top) continue;
    if (top >= drawn + 1 - gap) {
      if (drawn >= 0) bar(begun, drawn);
      begun = top;
    }
    drawn = bottom;
  }
  if (drawn >= 0) bar(begun, drawn);
}

// Which part of the mask is in view.
function paintBars(context, { mask, colours }, box, view, [wide, high]) {
  const bar = (x, y, long, across, from, share) => {
    if (share >= 0.999) return;
    const draw = (start, size, colour) => {
      context.fillStyle = colour;
      if (across) context.fillRect(x + start, y, size, 5);
      else context.fillRect(x, y + start, 5, size);
    };
    const size = Math.max(12, share * long);
    draw(0, long, colours.track);
    draw(Math.min(from * long, long - size), size, colours.line);
  };
  const [across, down] = [box.width / wide / mask.keys, box.height / high / mask.queries];
  bar(box.left, box.top + box.height + 6, box.width, true, view.x / mask.keys, across);
  bar(box.left + box.width + 6, box.top, box.height, false, view.y / mask.queries, down);
}

function keyName(mask, row, key, longest) {
  if (key < mask.seq_len) return row ? visible(row.texts[key], longest) : key.toString();
  const query = key - mask.seq_len;
  return `${blockOf(mask, query)}.${slotOf(mask, query)}`;
}

function queryName({ mask, row }, query, longest) {
  const block = blockOf(mask, query);
  const reads = slotOf(mask, query) || !mask.keep[block]
    ? "[mask]" : row ? visible(row.texts[mask.anchors[block]], longest) : `${mask.anchors[block]}`;
  return `${block}.${slotOf(mask, query)} ${reads}`;
}

// ---- A cell

// Lights up the row and the column of a cell, with their names on the axes.
function paintCell(context, scene, box, view, cell, strong) {
  const { mask, colours } = scene;
  const [wide, high] = cellSizes(mask, box, view.zoom);
  const width = Math.min(box.width, (mask.keys - view.x) * wide);
  const height = Math.min(box.height, (mask.queries - view.y) * high);
  const left = box.left + (cell.key - view.x) * wide;
  const top = box.top + (cell.query - view.y) * high;
  const [across, down] = [Math.max(1, wide), Math.max(1, high)];
  context.save();
  context.beginPath();
  context.rect(box.left, box.top, width, height);
  context.clip();
  context.fillStyle = colours.focus;
  context.globalAlpha = strong ? 0.2 : 0.28;
  context.fillRect(left, box.top, across, height);
  context.fillRect(box.left, top, width, down);
  context.globalAlpha = 1;
  context.lineWidth = strong ? 3 : 2;
  for (const [colour, grow] of [[colours.paper, 2], [strong ? colours.focus : colours.ink, 0]]) {
    context.strokeStyle = colour;
    const more = grow + (wide < 6 ? 4 : 0);
    const taller = grow + (high < 6 ? 4 : 0);
    context.strokeRect(left - more, top - taller, across + 2 * more, down + 2 * taller);
  }
  context.restore();
  if (left >= box.left - wide && left <= box.left + width) {
    const y = strong ? box.top - 34 : box.top - 14;
    paintFlag(context, colours, box, keyFlag(scene, cell.key), left + across / 2, y, strong, 0.5);
  }
  if (top >= box.top - high && top <= box.top + height) {
    const text = queryName(scene, cell.query, 10);
    paintFlag(context, colours, box, text, box.left - 9, top + down / 2, strong, 1);
  }
}

function keyFlag({ mask, row }, key) {
  if (key >= mask.seq_len) return keyName(mask, row, key);
  return `${key}${row ? ` ${visible(row.texts[key])}` : ""}`;
}

// A text on a ground of its own, with a share of it left of x.
function paintFlag(context, colours, box, text, x, y, strong, share) {
  context.font = FLAG_FONT;
  context.textBaseline = "middle";
  context.textAlign = "left";
  const room = textWidth(context, FLAG_FONT, text) + 10;
  const begin = Math.max(2, Math.min(x - share * room, box.left + box.width - room));
  context.fillStyle = strong ? colours.focus : colours.ink;
  context.fillRect(begin, y - 9, room, 18);
  context.fillStyle = colours.paper;
  context.fillText(text, begin + 5, y);
}
