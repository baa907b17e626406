// The mask on a canvas: queries down, keys across, from one cell to rows of 131,072 tokens.
//
// What the mask is says rule.js. Here each layer is a list of rectangles; a frame draws those in
// view one by one, or where too many share a line of the screen, adds up their shares of pixels.

// Room around the plot: names on the left and above it, the bars that show where one is below it
// and on its right.
const PLOT = { left: 122, top: 92, right: 14, bottom: 14 };
const LARGEST_CELL = 220; // Pixels: then a cell has room for the reason why it is hidden.
const ROOM_FOR_NAMES = 12;
const NAME_FONT = "11px ui-monospace, Menlo, Consolas, monospace";
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
.mask-legend { display: flex; flex-wrap: wrap; gap: 2px 16px; height: 44px; overflow-y: auto;
  align-content: flex-start; font-size: 12px; line-height: 20px; margin-bottom: 4px; }
.mask-legend span { display: inline-flex; align-items: center; gap: 5px; white-space: nowrap; }
.mask-legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
.mask-legend canvas { width: 16px; height: 12px; border: 1px solid var(--mask-line); }
.mask-main { display: grid; grid-template-columns: 100%; gap: 8px; }
@container (min-width: 940px) { .mask-main { grid-template-columns: minmax(0, 1fr) 268px; } }
.mask-stage { position: relative; height: 470px; border: 1px solid var(--mask-line);
  border-radius: 5px; overflow: hidden; }
.mask-layer { position: absolute; inset: 0; }
.mask-layer canvas { touch-action: none; outline-offset: -2px !important; }
.mask-card { border: 1px solid var(--mask-line); border-radius: 5px; padding: 10px 12px;
  height: 168px; overflow-y: auto; overflow-wrap: anywhere; }
.mask-card h4 { margin: 0 0 6px; font-size: 13px; line-height: 1.4; display: flex; gap: 8px;
  justify-content: space-between; align-items: start; }
.mask-card h4 button { height: 22px; min-width: 24px; padding: 0 6px; font-size: 12px;
  font-weight: 400; border-radius: 4px; }
.mask-card dl { display: grid; grid-template-columns: fit-content(90px) 1fr fit-content(90px) 1fr;
  gap: 2px 10px; margin: 0; }
@container (min-width: 940px) {
  .mask-card { height: 470px; }
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

// ---- Places: cells of the mask, and pixels of the plot

// How many pixels a key and a query take at a zoom between 0, the whole mask, and 1, a large cell.
// Whole masks of few cells have square ones.
function cellSizes(mask, box, zoom) {
  const whole = [box.width / mask.keys, box.height / mask.queries];
  const least = Math.min(...whole, 40);
  const fit = least >= 6 ? [least, least] : whole.map((size) => Math.min(size, 40));
  return fit.map((size) => size * (LARGEST_CELL / size) ** zoom);
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

// ---- Painting

// Whether so many rectangles share the lines of the screen that they are not drawn one by one.
function manyShare(context, layers, box, view, [, high], blockSize) {
  const lines = box.height * context.getTransform().a;
  if (blockSize * high * context.getTransform().a < 4) return true;
  const past = view.y + box.height / high;
  return layers.some(({ rectangles }) =>
    firstBehind(rectangles, past) - firstBehind(rectangles, view.y) > 5 * 4 * lines);
}

// Draws layers in which each pixel holds many queries: its colour is the mean of its cells', but of
// what is rarer than `least` no fainter than that, so that a thin line is not lost.
function paintShares(context, layers, box, view, sizes, colours) {
  const ratio = context.getTransform().a;
  const width = Math.round(box.width * ratio);
  const height = Math.round(box.height * ratio);
  const image = imageOf(context, width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const [wide, high] = [sizes[0] * ratio, sizes[1] * ratio];
  const ground = channels(colours.ground);
  const [red, green, blue] = [0, 1, 2].map(() => new Float32Array(width));
  const prepared = layers.map((layer) => ({
    ...layer,
    from: firstBehind(layer.rectangles, view.y),
    looks: layer.looks.map((look) => look && {
      colour: channels(look.colour), alpha: look.alpha, least: look.least,
      // What is added at each pixel along a line, and between which pixels.
      edges: new Float32Array(width + 2), low: width, high: -1,
    }),
  }));
  for (let line = 0; line < height; line++) {
    const query = view.y + line / high;
    const past = query + 1 / high;
    red.fill(ground[0]);
    green.fill(ground[1]);
    blue.fill(ground[2]);
    for (const layer of prepared) {
      const { rectangles, looks } = layer;
      while (layer.from < rectangles.length && rectangles[layer.from + 1] <= query) layer.from += 5;
      for (let i = layer.from; i < rectangles.length && rectangles[i] < past; i += 5) {
        const look = looks[rectangles[i + 4]];
        if (!look) continue;
        const share = (Math.min(past, rectangles[i + 1]) - Math.max(query, rectangles[i])) * high;
        const start = Math.max(0, (rectangles[i + 2] - view.x) * wide);
        const end = Math.min(width, (rectangles[i + 3] - view.x) * wide);
        if (start >= end) continue;
        // Summed along the line, these give each pixel the part of it that is inside.
        const [first, last] = [Math.floor(start), Math.floor(end)];
        look.low = Math.min(look.low, first);
        look.high = Math.max(look.high, last + 2);
        look.edges[first] += share * (1 - start + first);
        look.edges[first + 1] += share * (start - first);
        look.edges[last] -= share * (1 - end + last);
        look.edges[last + 1] -= share * (end - last);
      }
      for (const look of looks) {
        if (!look || look.low > look.high) continue;
        const { edges, alpha, least, low, high: past, colour: [r, g, b] } = look;
        let sum = 0;
        for (let x = low; x < Math.min(width, past); x++) {
          sum += edges[x];
          if (sum <= 1e-4) continue;
          const share = alpha * (sum > least ? Math.min(sum, 1) : least);
          red[x] += share * (r - red[x]);
          green[x] += share * (g - green[x]);
          blue[x] += share * (b - blue[x]);
        }
        edges.fill(0, low, past);
        look.low = width;
        look.high = -1;
      }
    }
    const at = line * width;
    for (let x = 0; x < width; x++) {
      pixels[at + x] = 0xff000000 | (blue[x] << 16) | (green[x] << 8) | red[x];
    }
  }
  context.putImageData(image, Math.round(box.left * ratio), Math.round(box.top * ratio));
}

// One image for all frames of a canvas: a new one each time would be much to throw away.
const IMAGES = new WeakMap();
function imageOf(context, width, height) {
  const known = IMAGES.get(context);
  if (known && known.width === width && known.height === height) return known;
  const image = context.createImageData(width, height);
  IMAGES.set(context, image);
  return image;
}

// Draws the rectangles in view one by one, each at least a pixel wide and high.
function paintRectangles(context, layer, box, view, sizes) {
  const { rectangles, looks } = layer;
  const [wide, high] = sizes;
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
    context.globalAlpha = look.alpha;
    context.fillStyle = look.colour;
    context.fillRect(left, top, across, down);
    if (look.hatch && across > 5 && down > 5) {
      context.globalAlpha = 1;
      context.fillStyle = look.hatch;
      context.fillRect(left, top, across, down);
    }
  }
  context.globalAlpha = 1;
}

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

// The colours of a theme as the mask uses them, and its stripes.
function maskColours(el, context) {
  const colours = palette(el);
  const striped = (kind, colour) => stripes(context, kind, colour);
  const { paper, ink } = colours;
  const looks = {
    regions: [null,
      { colour: colours.context, least: 0.12 },
      { colour: colours.own, least: 0.45, hatch: striped(".", paper) },
      { colour: colours.dummy, least: 0.45, hatch: striped("x", paper) },
    ],
    tiles: [null,
      { colour: colours.partial, least: 0.3, hatch: striped("/", paper) },
      { colour: colours.full, least: 0.3 },
    ],
    difference: [
      { colour: colours.onlyHere, least: 0.5, hatch: striped("/", paper) },
      { colour: colours.onlyThere, least: 0.5, hatch: striped("\\", paper) },
    ],
  };
  return { ...colours, ground: mixed(ink, paper, 0.05), looks };
}

// The mask with its axes; `scene` holds all that is to be seen.
function paintMask(context, scene, box, view) {
  const { mask, colours, layers, data } = scene;
  const sizes = cellSizes(mask, box, view.zoom);
  const shown = [];
  const show = (name, rectangles, alpha) => shown.push({
    rectangles,
    looks: colours.looks[name].map((look) => look && { ...look, alpha: alpha(look) }),
  });
  const compared = layers.difference && data.difference;
  if (layers.regions) {
    show("regions", data.regions, () => (compared ? 0.28 : layers.tiles ? 0.4 : 1));
  }
  if (layers.tiles) show("tiles", data.tiles.found, () => (compared ? 0.3 : 0.85));
  if (compared) show("difference", data.difference, () => 1);
  const width = Math.min(box.width, (mask.keys - view.x) * sizes[0]);
  const height = Math.min(box.height, (mask.queries - view.y) * sizes[1]);
  const part = { ...box, width, height };
  context.save();
  context.beginPath();
  context.rect(box.left, box.top, width, height);
  context.clip();
  if (manyShare(context, shown, part, view, sizes, mask.block_size)) {
    paintShares(context, shown, part, view, sizes, colours);
    // Tiles may be large where queries are not: they keep their stripes.
    if (layers.tiles && scene.tileSize * Math.min(...sizes) > 6) {
      const striped = colours.looks.tiles.map((look) => look?.hatch && { ...look, alpha: 0 });
      const tiles = { rectangles: data.tiles.found, looks: striped };
      paintRectangles(context, tiles, part, view, sizes);
    }
  } else {
    context.fillStyle = colours.ground;
    context.fillRect(box.left, box.top, width, height);
    for (const layer of shown) paintRectangles(context, layer, part, view, sizes);
  }
  if (layers.supervision) paintUnsupervised(context, scene, part, view, sizes);
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

// Veils the queries that are not supervised, and marks on the left those that are.
function paintUnsupervised(context, { mask, colours, blocks }, box, view, sizes) {
  const given = mask.layout === "anchor_given" ? 1 : 0;
  const last = Math.min(mask.blocks, Math.ceil((view.y + box.height / sizes[1]) / mask.block_size));
  context.fillStyle = mixed(colours.ink, colours.paper, 0.12);
  context.globalAlpha = 0.62;
  let drawn = -1;
  for (let block = blockOf(mask, Math.floor(view.y)); block < last; block++) {
    const first = block * mask.block_size;
    const kept = mask.keep[block] ? blocks.supervised[block] : 0;
    const parts = [[first, first + given], [first + given + kept, first + mask.block_size]];
    for (const [from, past] of parts) {
      const top = box.top + (from - view.y) * sizes[1];
      const bottom = box.top + (past - view.y) * sizes[1];
      // Where many blocks share a pixel, one of them speaks for it.
      if (from === past || bottom < drawn + 0.5) continue;
      context.fillRect(box.left, top, box.width, bottom - top);
      drawn = bottom;
    }
  }
  context.globalAlpha = 1;
}

// Lines between cells, tiles, blocks and documents, each kind where it has room.
function paintLines(context, { mask, colours, layers, tileSize }, box, view, sizes) {
  const least = 1 / context.getTransform().a;
  const lines = (step, colour, alpha, width, from = 0) => {
    context.beginPath();
    const { left, top } = box;
    const x = (key) => Math.round((left + (key - view.x) * sizes[0]) / least + 0.5) * least;
    const y = (query) => Math.round((top + (query - view.y) * sizes[1]) / least + 0.5) * least;
    const begin = Math.max(from, from + Math.ceil((view.x - from) / step) * step);
    for (let at = begin; at <= view.x + box.width / sizes[0]; at += step) {
      context.moveTo(x(at), top);
      context.lineTo(x(at), top + box.height);
    }
    const past = view.y + box.height / sizes[1];
    for (let at = Math.ceil(view.y / step) * step; at <= past; at += step) {
      context.moveTo(left, y(at));
      context.lineTo(left + box.width, y(at));
    }
    context.globalAlpha = alpha;
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  };
  const small = Math.min(...sizes);
  if (small >= 5) lines(1, colours.paper, Math.min(1, small / 14), small > 10 ? 1 : least);
  if (small * mask.block_size >= 12) lines(mask.block_size, colours.ink, 0.45, 1, mask.seq_len);
  if (layers.tiles && small * tileSize >= 7) {
    lines(tileSize, colours.ink, 0.5, small * tileSize > 60 ? 2 : 1);
  }
  context.globalAlpha = 1;
  context.strokeStyle = colours.ink;
  context.setLineDash([4, 4]);
  context.lineWidth = 1;
  let drawn = -Infinity;
  for (const document of mask.documents.subarray(1)) {
    const x = Math.round(box.left + (document - view.x) * sizes[0]) + 0.5;
    if (x < Math.max(box.left, drawn + 4) || x > box.left + box.width) continue;
    drawLine(context, x, box.top, x, box.top + box.height);
    drawn = x;
  }
  context.setLineDash([]);
  const seam = box.left + (mask.seq_len - view.x) * sizes[0];
  context.lineWidth = 2;
  drawLine(context, seam, box.top, seam, box.top + box.height);
}

function drawLine(context, x, y, toX, toY) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

// In cells as large as a card: why they are visible or hidden.
function paintReasons(context, { mask, colours }, box, view, [wide, high]) {
  context.font = "11px sans-serif";
  context.textAlign = "left";
  context.textBaseline = "top";
  const past = Math.min(mask.queries, view.y + box.height / high);
  const pastKey = Math.min(mask.keys, view.x + box.width / wide);
  for (let query = Math.floor(view.y); query < past; query++) {
    for (let key = Math.floor(view.x); key < pastKey; key++) {
      const left = box.left + (key - view.x) * wide + 6;
      const top = box.top + (query - view.y) * high + 6;
      const lines = [""];
      for (const word of why(mask, query, key).split(" ")) {
        const longer = `${lines.at(-1)} ${word}`.trim();
        if (context.measureText(longer).width <= wide - 20) lines[lines.length - 1] = longer;
        else lines.push(word);
      }
      const room = Math.max(...lines.map((line) => context.measureText(line).width));
      context.fillStyle = colours.paper;
      context.fillRect(left - 2, top - 2, room + 8, lines.length * 14 + 4);
      context.fillStyle = colours.ink;
      lines.forEach((line, i) => context.fillText(line, left + 2, top + 14 * i));
    }
  }
}

// Above the plot: what lies there, the documents, and the tokens' names or numbers.
function paintKeys(context, scene, box, view, [wide]) {
  const { mask, colours, row } = scene;
  const at = (key) => box.left + (key - view.x) * wide;
  const pastKey = Math.min(mask.keys, view.x + box.width / wide);
  const seam = Math.max(box.left, Math.min(box.left + box.width, at(mask.seq_len)));
  context.save();
  context.textBaseline = "middle";
  context.fillStyle = colours.ink;
  const titles = [
    [box.left, seam, [`keys: ${mask.seq_len.toLocaleString("en")} context tokens`, "context"]],
    [seam, box.left + box.width, [
      `${mask.queries.toLocaleString("en")} slots: ${mask.blocks.toLocaleString("en")} `
        + `blocks of ${mask.block_size}`, "slots"]],
  ];
  context.font = "600 12px sans-serif";
  for (const [left, right, texts] of titles) {
    const text = texts.find((one) => context.measureText(one).width < right - left - 6);
    if (!text) continue;
    context.textAlign = "center";
    context.fillText(text, (left + right) / 2, 11);
    context.fillRect(left + 2, 19, right - left - 4, 1);
  }
  context.font = "11px sans-serif";
  context.fillStyle = colours.faint;
  if (mask.documents.length > 1) {
    mask.documents.forEach((start, i) => {
      const left = Math.max(box.left, at(start));
      const right = Math.min(box.left + box.width, at(mask.documents[i + 1] ?? mask.seq_len));
      const text = start >= mask.length ? "padding" : `document ${i}`;
      const fits = (one) => context.measureText(one).width < right - left - 4;
      const shown = [text, String(i)].find(fits);
      if (shown) context.fillText(shown, (left + right) / 2, 28);
    });
  }
  if (wide >= ROOM_FOR_NAMES) {
    context.font = NAME_FONT;
    context.textAlign = "left";
    for (let key = Math.floor(view.x); key < pastKey; key++) {
      const x = at(key + 0.5);
      if (x < box.left || x > box.left + box.width) continue;
      context.save();
      context.translate(x, box.top - 6);
      context.rotate(-Math.PI / 2);
      context.fillStyle = colours.ink;
      context.fillText(keyName(mask, row, key, 8), 0, 0);
      context.restore();
    }
  } else {
    context.textAlign = "center";
    context.fillStyle = colours.ink;
    const step = roundStep(wide, 64);
    const end = Math.min(pastKey, mask.seq_len);
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
  // A band of the tokens that are supervised, at the edge of the plot.
  if (scene.layers.supervision && row) {
    context.fillStyle = colours.accepted;
    let drawn = -1;
    for (let i = 0; i < row.labels.length; i += 2) {
      const left = Math.max(box.left, at(row.labels[i]), drawn);
      const right = Math.min(box.left + box.width, at(row.labels[i + 1]));
      if (right <= left) continue;
      context.fillRect(left, box.top - 4, Math.max(0.7, right - left), 3);
      drawn = right;
    }
  }
  context.restore();
}

function paintTick(context, x, y, text, colours) {
  context.fillStyle = colours.line;
  context.fillRect(Math.round(x), y - 11, 1, 6);
  context.fillStyle = colours.ink;
  context.fillText(text, x, y - 19);
}

// On the left: the slots' names, or the numbers of the blocks; which slots are supervised.
function paintQueries(context, scene, box, view, [, high]) {
  const { mask, colours, blocks } = scene;
  const at = (query) => box.top + (query - view.y) * high;
  const past = Math.min(mask.queries, view.y + box.height / high);
  context.save();
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillStyle = colours.ink;
  const edge = box.left - 14;
  if (high >= ROOM_FOR_NAMES) {
    context.font = NAME_FONT;
    for (let query = Math.floor(view.y); query < past; query++) {
      const y = at(query + 0.5);
      if (y < box.top || y > box.top + box.height) continue;
      context.fillText(queryName(scene, query, 8), edge, y);
    }
  } else {
    context.font = "11px sans-serif";
    const step = roundStep(high * mask.block_size, 24);
    const first = Math.floor(view.y / mask.block_size / step) * step;
    for (let block = first; block * mask.block_size < past; block += step) {
      const y = at(block * mask.block_size);
      if (y < box.top - 1) continue;
      context.fillText(`block ${block.toLocaleString("en")}`, edge - 2, y + 6);
      context.fillRect(edge + 1, Math.round(y), 4, 1);
    }
  }
  context.font = "600 12px sans-serif";
  context.fillText("queries", edge, box.top - 12);
  if (scene.layers.supervision) {
    const given = mask.layout === "anchor_given" ? 1 : 0;
    context.fillStyle = context.strokeStyle = colours.accepted;
    for (let block = blockOf(mask, Math.floor(view.y)); block * mask.block_size < past; block++) {
      const first = block * mask.block_size + given;
      const count = mask.keep[block] ? blocks.supervised[block] : 0;
      const top = Math.max(box.top, at(first));
      const bottom = Math.min(box.top + box.height, at(first + count));
      const gap = high > 6 ? 1 : 0;
      if (bottom > top) context.fillRect(box.left - 7, top, 4, Math.max(0.3, bottom - top - gap));
    }
  }
  context.restore();
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
    draw(0, long, mixed(colours.ink, colours.paper, 0.15));
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

// Lights up the row and the column of a cell, with their names on the axes.
function paintCell(context, scene, box, view, cell, strong) {
  const { mask, colours, row } = scene;
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
  context.font = "600 11px sans-serif";
  context.textBaseline = "middle";
  const flag = (text, x, y, align) => {
    const room = context.measureText(text).width + 10;
    const begin = Math.max(2, Math.min(align === "right" ? x - room : x - room / 2,
      box.left + box.width - room));
    context.fillStyle = strong ? colours.focus : colours.ink;
    context.fillRect(begin, y - 9, room, 18);
    context.fillStyle = colours.paper;
    context.textAlign = "left";
    context.fillText(text, begin + 5, y);
  };
  const key = cell.key < mask.seq_len
    ? `${cell.key}${row ? ` ${visible(row.texts[cell.key])}` : ""}` : keyName(mask, row, cell.key);
  if (left >= box.left - wide && left <= box.left + width) {
    flag(key, left + across / 2, strong ? box.top - 34 : box.top - 14, "center");
  }
  if (top >= box.top - high && top <= box.top + height) {
    flag(queryName(scene, cell.query, 10), box.left - 9, top + down / 2, "right");
  }
}

// ---- The widget

function render({ model, el }) {
  const root = node("div", { class: "mask", "data-lm-suppress-shortcuts": "true" });
  el.append(root);
  addStyle(root, MASK_STYLE);
  const layers = { regions: true, tiles: false, supervision: true, difference: true };
  let [scene, view, frame] = [null, { zoom: 0, x: 0, y: 0 }, 0];
  let [hovered, pinned, side] = [null, model.get("selection") ?? null, "mask"];
  const box = { left: PLOT.left, top: PLOT.top, width: 1, height: 1 };

  const button = (label, title, call, more = {}) =>
    node("button", { type: "button", "aria-label": title, title, onclick: call, ...more }, label);
  const toggles = Object.fromEntries(Object.keys(layers).map((name, i) => [
    name, button(name, `layer: ${name} (key ${i + 1})`, () => toggle(name)),
  ]));
  const sizes = node("select", { "aria-label": "tile size", onchange: () => {
    layers.tiles = true;
    settle();
  } }, [8, 16, 32, 64, 128, 256, 512].map((size) => node("option", { value: size }, `${size}`)));
  const which = node("select", { "aria-label": "which mask is drawn", onchange: () => {
    side = which.value;
    settle();
  } });
  const next = button("next difference", "next difference (key n)", () => jump(false));
  const group = (...children) => node("span", { class: "mask-group", role: "group" }, ...children);
  const compare = group(which, next);
  const help = node("div", { class: "mask-help", hidden: true, role: "note" },
    describedList(MASK_KEYS));
  const ask = button("?", "keys", () => showHelp(help.hidden), { "aria-expanded": "false" });
  const legend = node("div", { class: "mask-legend", role: "list", "aria-label": "legend" });
  const stage = node("div", { class: "mask-stage" });
  const card = node("div", { class: "mask-card", role: "region", "aria-label": "selected cell" });
  const strip = node("div", { class: "mask-strip" });
  root.append(
    node("div", { class: "mask-bar", role: "toolbar", "aria-label": "mask" },
      group(toggles.regions, toggles.tiles, sizes), group(toggles.supervision, toggles.difference),
      compare, node("span", { class: "mask-space" }),
      group(button("−", "zoom out (key -)", () => zoomBy(1 / 2)),
        button("+", "zoom in (key +)", () => zoomBy(2)),
        button("fit", "the whole mask (key 0)", () => reset(false)),
        button("reset", "the whole mask, no selection, layers as at first", () => reset(true)),
        ask)),
    legend, node("div", { class: "mask-main" }, stage, card), strip,
  );
  const [under, over] = [0, 1].map(() => node("div", { class: "mask-layer" }));
  stage.append(under, over, help);
  const base = canvasIn(under, (context, width, height) => {
    if (!scene) return;
    box.width = Math.max(40, width - PLOT.left - PLOT.right);
    box.height = Math.max(40, height - PLOT.top - PLOT.bottom);
    view = withinMask(scene.mask, box, view);
    paintMask(context, scene, box, view);
    el.dataset.frame = frame;
    el.dataset.view = JSON.stringify({ ...view, box, cell: cellSizes(scene.mask, box, view.zoom) });
    marks.redraw();
  });
  const marks = canvasIn(over, (context) => {
    if (!scene) return;
    if (pinned) paintCell(context, scene, box, view, pinned, true);
    if (hovered) paintCell(context, scene, box, view, hovered, false);
  });
  base.canvas.setAttribute("aria-hidden", "true");
  const canvas = marks.canvas;
  canvas.setAttribute("tabindex", 0);
  canvas.setAttribute("role", "application");
  const words = tip(stage);
  const { say } = speaker(root);

  // What is drawn, from the state.

  let [state, givenSize, read] = [null, null, null];
  function update() {
    state = model.get("state");
    if (!state?.mask) return;
    read = readState(state, rowOf(model));
    if (state.tile_size !== givenSize) {
      givenSize = state.tile_size;
      if (![...sizes.options].some((one) => Number(one.value) === givenSize)) {
        sizes.append(node("option", { value: givenSize }, `${givenSize}`));
      }
      sizes.value = givenSize;
    }
    frame = state.frame ?? 0;
    if (!read.other) side = "mask";
    const names = [["mask", read.mask.name || "this mask"], ["other", read.other?.name ?? ""]];
    which.replaceChildren(...names.map(([value, name]) => node("option", { value }, name)));
    which.value = side;
    compare.hidden = !read.other;
    compare.style.display = read.other ? "" : "none";
    if (pinned && !exists(pinned)) pinned = null;
    hovered = null;
    words.hide();
    settle();
  }

  function exists({ query, key }) {
    return query >= 0 && query < read.mask.queries && key >= 0 && key < read.mask.keys;
  }

  // Brings all into step with the state, the layers, and the theme.
  function settle() {
    if (!read) return;
    const tileSize = Number(sizes.value);
    const mask = side === "other" ? read.other : read.mask;
    const old = scene?.source === read ? scene.data : {};
    const same = scene?.mask === mask;
    const data = {
      regions: same ? old.regions : rectangles(mask),
      counts: same ? old.counts : countRegions(mask),
      tiles: same && scene.tileSize === tileSize && old.tiles,
      difference: old.difference ?? (read.other && differenceRectangles(read.mask, read.other)),
    };
    data.tiles ||= layers.tiles ? tileRectangles(mask, tileSize) : null;
    data.found = old.found
      ?? (read.other && countDifferences(read.mask, data.difference));
    const colours = scene?.colours ?? themed();
    const { blocks, row } = read;
    scene = { source: read, mask, blocks, row, tileSize, layers, colours, data };
    canvas.setAttribute("aria-label", `attention mask: ${mask.queries} queries, slots of `
      + `${mask.blocks} blocks; ${mask.keys} keys, ${mask.seq_len} of them context tokens. Arrow `
      + "keys move the selection, ? lists all keys.");
    for (const [name, toggle] of Object.entries(toggles)) {
      const possible = name !== "difference" || read.other !== null;
      toggle.setAttribute("aria-pressed", layers[name] && possible);
    }
    toggles.difference.disabled = !read.other;
    toggles.difference.title = read.other ? "layer: difference (key 4)" : "there is no other mask";
    showLegend();
    showCard();
    base.redraw();
  }

  function themed() {
    const colours = maskColours(root, canvas.getContext("2d"));
    const names = { ink: "ink", paper: "paper", line: "line", faint: "faint", focus: "focus",
      context: "context", own: "own", good: "accepted" };
    for (const [name, of] of Object.entries(names)) {
      root.style.setProperty(`--mask-${name}`, colours[of]);
    }
    root.style.setProperty("--mask-tint", mixed(colours.ink, colours.paper, 0.08));
    return colours;
  }

  function showLegend() {
    const { colours, data, tileSize } = scene;
    const entry = (name, count, look) => node("span", { role: "listitem" },
      look && swatch(look, colours), name, " ", node("b", {}, count.toLocaleString("en")));
    const empty = { colour: colours.ground };
    const entries = [];
    if (layers.regions) {
      data.counts.forEach((count, i) => {
        if (count || i < 3) {
          entries.push(entry(REGION_NAMES[i], count, colours.looks.regions[i] ?? empty));
        }
      });
    }
    if (layers.tiles) {
      data.tiles.counts.forEach((count, i) => {
        const name = `${TILE_NAMES[i]} tiles of ${tileSize}`;
        entries.push(entry(name, count, colours.looks.tiles[i] ?? empty));
      });
    }
    if (layers.supervision) {
      const supervised = read.blocks.supervised.reduce((sum, one) => sum + one, 0);
      entries.push(entry("supervised slots", supervised, { colour: colours.accepted }));
    }
    if (layers.difference && read.other) {
      const { only, first } = data.found;
      const [here, there] = [read.mask.name || "this mask", read.other.name];
      entries.push(entry(`only ${here}`, only[0], colours.looks.difference[0]));
      entries.push(entry(`only ${there}`, only[1], colours.looks.difference[1]));
      if (first) {
        const { block, slot } = slotFacts(read, first.query);
        entries.push(node("span", { role: "listitem" },
          `first at block ${block}, slot ${slot}, ${keyWords(read.mask, first.key)}`));
      } else entries.push(node("span", { role: "listitem" }, "the two masks are the same"));
    }
    next.disabled = !data.found?.first;
    legend.replaceChildren(...entries);
  }

  // The selected cell in words, and its two tokens in their text.
  function showCard() {
    if (!pinned) {
      card.replaceChildren(node("h4", {}, "No cell selected"), node("p", { class: "faint" },
        "Point at a cell to read what it is and why it is visible or hidden. Click to keep it "
        + "here; arrow keys move it, Escape lets go. The wheel zooms, dragging moves, ? lists all "
        + "keys."));
    } else {
      const facts = cellFacts({ ...read, mask: scene.mask, tileSize: scene.tileSize,
        other: otherOf() }, pinned.query, pinned.key);
      const { query, key, tile, other } = facts;
      const rows = [
        ["query", `block ${query.block}, slot ${query.slot}${query.kept ? "" : ", a dummy"}`],
        ["reads", visible(query.input, 24) + (query.kept && !query.slot ? ", the anchor" : "")],
        ["position", `${query.position}${query.kept ? `, anchor ${query.anchor}` : ""}`],
        ["predicts", query.label_position >= 0 && query.kept
          ? `token ${query.label_position} ${visible(query.label, 24)}` : "nothing"],
        ["supervised", query.supervised ? "yes" : `no: ${query.reason}`],
        ["key", key.kind === "token" ? `token ${key.token} ${visible(key.text, 24)}`
          : `block ${key.block}, slot ${key.slot}${key.kept ? "" : ", a dummy"}`],
        key.kind === "token" ? ["document", `${key.document}`] : ["reads", visible(key.input, 24)],
        ["tile", `row ${tile.row}, column ${tile.column} of ${tile.size}: ${tile.state}`],
      ];
      if (other) rows.push([other.name, other.why]);
      card.replaceChildren(
        node("h4", {}, "Selected cell", button("✕", "let go (Escape)", () => select(null))),
        node("p", { class: `mask-why ${facts.visible ? "seen" : ""}` }, facts.why),
        describedList(rows),
      );
    }
    showStrip();
  }

  function otherOf() {
    return side === "other" ? read.mask : read.other;
  }

  function showStrip() {
    const cell = hovered ?? pinned;
    const { mask, row } = scene;
    if (!row || !cell) {
      const hint = row ? "the tokens of the cell that you point at" : "the row's text is not known";
      strip.replaceChildren(...["key", "query"].map((name) => node("div", {},
        node("div", { class: "faint" }, `text around the ${name}: ${hint}`), node("p", {}))));
      return;
    }
    const query = slotFacts(read, cell.query);
    const ofKey = cell.key < mask.seq_len ? null : slotFacts(read, cell.key - mask.seq_len);
    const key = ofKey ? ofKey.anchor + ofKey.slot : cell.key;
    const label = query.kept ? query.label_position : -1;
    const pane = (title, centre) => {
      const marks = [[key, "key"], [query.kept ? query.anchor : -1, "anchor"], [label, "label"]];
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
    };
    const keyTitle = ofKey
      ? `key: where slot ${ofKey.slot} of block ${ofKey.block} stands (outlined)`
      : `key: token ${cell.key} (outlined)`;
    const aim = query.kept ? `query: anchor ${query.anchor} (bold)`
      + (label >= 0 ? `, predicts token ${label} (double line)` : "") : "query: of a dummy block";
    strip.replaceChildren(pane(keyTitle, key), pane(aim, query.kept ? query.anchor : 0));
  }

  // What the user does.

  function cellAt(x, y) {
    const [wide, high] = cellSizes(scene.mask, box, view.zoom);
    const key = Math.floor(view.x + (x - box.left) / wide);
    const query = Math.floor(view.y + (y - box.top) / high);
    const [right, bottom] = [box.left + box.width, box.top + box.height];
    const inside = x >= box.left && y >= box.top && x < right && y < bottom;
    return inside && exists({ query, key }) ? { query, key } : null;
  }

  function factsOf(cell) {
    return factLines(cellFacts({ ...read, mask: scene.mask, other: otherOf(),
      tileSize: scene.tileSize }, cell.query, cell.key), (text) => visible(text, 24));
  }

  function hover(x, y) {
    const cell = scene && cellAt(x, y);
    hovered = cell;
    canvas.style.cursor = cell ? "crosshair" : "default";
    if (cell) {
      const lines = factsOf(cell);
      const [wide, high] = cellSizes(scene.mask, box, view.zoom);
      const shared = Math.max(1, 1 / wide) * Math.max(1, 1 / high);
      if (shared >= 2) {
        const about = Math.round(shared).toLocaleString("en");
        lines.push(`This pixel holds about ${about} cells; this is the one under the pointer's `
          + "centre.");
      }
      words.show(x, y, lines);
    } else words.hide();
    showStrip();
    marks.redraw();
  }

  function leave() {
    hovered = null;
    words.hide();
    if (scene) showStrip();
    marks.redraw();
  }

  function select(cell, moveView = false) {
    pinned = cell;
    model.set("selection", cell && { query: cell.query, key: cell.key });
    model.save_changes();
    if (cell && moveView) reveal(cell);
    say(cell ? factsOf(cell).join(". ") : "no cell selected");
    showCard();
    marks.redraw();
  }

  // Moves the view as little as shows a cell.
  function reveal({ query, key }) {
    const [wide, high] = cellSizes(scene.mask, box, view.zoom);
    const [across, down] = [box.width / wide, box.height / high];
    const moved = (from, at, room) => Math.min(at, Math.max(from, at + 1 - room));
    move({ ...view, x: moved(view.x, key, across), y: moved(view.y, query, down) });
  }

  function move(to) {
    view = withinMask(scene.mask, box, to);
    base.redraw();
  }

  function middle() {
    const [wide, high] = cellSizes(scene.mask, box, view.zoom);
    const at = pinned && [(pinned.key + 0.5 - view.x) * wide, (pinned.query + 0.5 - view.y) * high];
    const inView = at && at[0] >= 0 && at[1] >= 0 && at[0] <= box.width && at[1] <= box.height;
    return inView ? at : [box.width / 2, box.height / 2];
  }

  function zoomBy(factor, [x, y] = middle()) {
    if (!scene) return;
    move(zoomedAt(scene.mask, box, view, view.zoom + zoomStep(scene.mask, box, factor), x, y));
  }

  function reset(all) {
    if (all) {
      Object.assign(layers, { regions: true, tiles: false, supervision: true, difference: true });
      side = which.value = "mask";
      select(null);
    }
    move({ zoom: 0, x: 0, y: 0 });
    settle();
  }

  function toggle(name) {
    if (name === "difference" && !read?.other) return;
    layers[name] = !layers[name];
    say(`${name} ${layers[name] ? "shown" : "hidden"}`);
    settle();
  }

  function jump(backwards) {
    if (!scene?.data.difference) return;
    const from = pinned ?? { query: -1, key: -1 };
    const found = nextDifference(scene.data.difference, from.query, from.key, backwards);
    if (!found) return say("the two masks are the same");
    layers.difference = true;
    select({ query: found.query, key: found.key }, true);
    settle();
  }

  function focusOn(cell) {
    const target = 26;
    const [wide] = cellSizes(scene.mask, box, 0);
    const zoom = Math.max(view.zoom, Math.log(target / wide) / Math.log(LARGEST_CELL / wide));
    const [w, h] = cellSizes(scene.mask, box, zoom);
    move({ zoom, x: cell.key + 0.5 - box.width / w / 2, y: cell.query + 0.5 - box.height / h / 2 });
  }

  function showHelp(open) {
    help.hidden = !open;
    ask.setAttribute("aria-expanded", open);
  }

  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  function press(event) {
    if (!scene || event.ctrlKey || event.metaKey || event.altKey) return;
    const { mask } = scene;
    const block = mask.block_size;
    const step = steps[event.key] ?? { PageUp: [-block, 0], PageDown: [block, 0] }[event.key];
    const [wide, high] = cellSizes(mask, box, view.zoom);
    const names = Object.keys(layers);
    if (step && event.shiftKey) {
      move({ ...view, x: view.x + step[1] * 60 / wide, y: view.y + step[0] * 60 / high });
    } else if (step) {
      const start = { query: Math.floor(view.y + box.height / high / 2),
        key: Math.floor(view.x + box.width / wide / 2) };
      const within = (at, count) => Math.max(0, Math.min(at, count - 1));
      const from = pinned ?? { query: start.query - step[0], key: start.key - step[1] };
      select({ query: within(from.query + step[0], mask.queries),
        key: within(from.key + step[1], mask.keys) }, true);
    } else if (event.key === "+" || event.key === "=") zoomBy(1.5);
    else if (event.key === "-" || event.key === "_") zoomBy(1 / 1.5);
    else if (event.key === "0") reset(false);
    else if (event.key === "Enter" && pinned) focusOn(pinned);
    else if (event.key === "n") jump(false);
    else if (event.key === "p" || event.key === "N") jump(true);
    else if (names[event.key - 1]) toggle(names[event.key - 1]);
    else if (event.key === "?") showHelp(help.hidden);
    else if (event.key === "Escape") {
      if (!help.hidden) showHelp(false);
      else {
        leave();
        select(null);
      }
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // Where the page scrolls under a pointer that rests, its wheel is not taken.
  let [outside, lastZoom] = [{ x: NaN, y: NaN }, 0];
  const watch = (event) => {
    if (!stage.contains(event.composedPath()[0])) outside = { x: event.screenX, y: event.screenY };
  };
  window.addEventListener("wheel", watch, { capture: true, passive: true });
  function wheel(event) {
    if (!scene) return;
    if (event.screenX === outside.x && event.screenY === outside.y && !event.ctrlKey) return;
    const unit = event.deltaMode === 1 ? 33 : 1;
    const [x, y] = [event.offsetX - box.left, event.offsetY - box.top];
    const [wide, high] = cellSizes(scene.mask, box, view.zoom);
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const across = (event.deltaX || event.deltaY) * unit;
      move({ ...view, x: view.x + across / wide });
    } else {
      // At its limit the mask lets the page scroll, but not in the middle of a gesture.
      const out = event.deltaY > 0 && view.zoom === 0 && event.timeStamp - lastZoom > 400;
      if (out && !event.ctrlKey) return;
      lastZoom = event.timeStamp;
      zoomBy(Math.exp(-event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.003)), [x, y]);
    }
    event.preventDefault();
    hover(event.offsetX, event.offsetY);
  }

  const pointers = new Map();
  let [start, dragged] = [null, false];
  const place = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  };
  function down(event) {
    if (event.button) return;
    pointers.set(event.pointerId, place(event));
    // A pointer that no longer exists cannot be held.
    try { canvas.setPointerCapture(event.pointerId); } catch { /* it is not held */ }
    dragged = pointers.size > 1;
    start = place(event);
  }
  function drag(event) {
    const at = place(event);
    outside = { x: NaN, y: NaN };
    const before = pointers.get(event.pointerId);
    if (!before) return hover(at.x, at.y);
    const [wide, high] = cellSizes(scene.mask, box, view.zoom);
    if (pointers.size === 1) {
      if (!dragged && Math.hypot(at.x - start.x, at.y - start.y) < 4) return;
      if (!dragged) leave();
      dragged = true;
      canvas.style.cursor = "grabbing";
      move({ ...view, x: view.x - (at.x - before.x) / wide, y: view.y - (at.y - before.y) / high });
    } else {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const apart = (one) => Math.max(10, Math.hypot(one.x - other.x, one.y - other.y));
      const centre = { x: (at.x + other.x) / 2, y: (at.y + other.y) / 2 };
      const was = { x: (before.x + other.x) / 2, y: (before.y + other.y) / 2 };
      const [across, down] = [centre.x - was.x, centre.y - was.y];
      move({ ...view, x: view.x - across / wide, y: view.y - down / high });
      zoomBy(apart(at) / apart(before), [centre.x - box.left, centre.y - box.top]);
    }
    pointers.set(event.pointerId, at);
  }
  function up(event) {
    if (!pointers.delete(event.pointerId)) return;
    const at = place(event);
    if (!dragged && event.type === "pointerup") {
      const cell = scene && cellAt(at.x, at.y);
      if (cell) select(cell);
    }
    canvas.style.cursor = "crosshair";
  }

  const handlers = { pointerdown: down, pointermove: drag, pointerup: up, pointercancel: up,
    pointerleave: leave, keydown: press };
  for (const [name, call] of Object.entries(handlers)) canvas.addEventListener(name, call);
  canvas.addEventListener("dblclick", (event) => {
    const cell = scene && cellAt(event.offsetX, event.offsetY);
    if (cell) focusOn(cell);
  });
  canvas.addEventListener("wheel", wheel, { passive: false });
  help.addEventListener("keydown", press);

  const stopTheme = onTheme(root, () => {
    if (!scene) return;
    // The page's colours are measured behind the widget's own.
    scene.colours = themed();
    settle();
  });
  const chosen = () => {
    const cell = model.get("selection");
    if (cell?.query === pinned?.query && cell?.key === pinned?.key) return;
    pinned = cell && read && exists(cell) ? cell : null;
    if (scene) showCard();
    marks.redraw();
  };
  model.on("change:state", update);
  model.on("change:row", update);
  model.on("change:selection", chosen);
  update();
  return () => {
    model.off("change:state", update);
    model.off("change:row", update);
    model.off("change:selection", chosen);
    window.removeEventListener("wheel", watch, { capture: true });
    stopTheme();
    words.stop();
    base.stop();
    marks.stop();
  };
}

// A small picture of a look, its stripes included.
function swatch(look, colours) {
  const picture = node("canvas", { width: 32, height: 24, "aria-hidden": "true" });
  const pen = picture.getContext("2d");
  pen.scale(2, 2);
  pen.fillStyle = look.colour ?? colours.ground;
  pen.fillRect(0, 0, 16, 12);
  if (look.hatch) {
    pen.fillStyle = look.hatch;
    pen.fillRect(0, 0, 16, 12);
  }
  return picture;
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
