// Helpers of all widgets: elements, colours of the theme, sharp canvases, tips, files.
//
// Python puts this file in front of every widget's own (see widget.py). All of a widget's files
// share one scope, so names at the top are specific.

// An element; strings among the children become text, never markup. Properties are attributes,
// handlers ("onclick"), or `style`, an object. "svg:rect" makes an element of SVG.
function node(tag, properties = {}, ...children) {
  const svg = tag.startsWith("svg:");
  const made = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "style" && typeof value === "object") Object.assign(made.style, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat().filter((child) => child !== undefined && child !== null));
  return made;
}

// Puts rules into the root of a widget, where they also reach it inside a shadow tree.
function addStyle(el, css) {
  el.prepend(node("style", {}, css));
}

// The numbers that Python sent as the bytes of an array.
function values(data, Type) {
  if (!data) return new Type(0);
  const whole = data instanceof ArrayBuffer;
  const [buffer, from] = whole ? [data, 0] : [data.buffer, data.byteOffset];
  const end = from + data.byteLength;
  // An array's bytes must start at a multiple of its item's size.
  if (from % Type.BYTES_PER_ELEMENT) return new Type(buffer.slice(from, end));
  return new Type(buffer, from, data.byteLength / Type.BYTES_PER_ELEMENT);
}

// White space and what has no shape of its own made visible; longer texts are cut.
function visible(text, longest = 12) {
  const signs = { "\n": "⏎", "\t": "⇥", " ": "␣" };
  const shown = [...text].map((one) => signs[one] ?? (/[\p{C}\p{Z}]/u.test(one) ? "·" : one));
  return shown.length > longest ? shown.slice(0, longest - 1).join("") + "…" : shown.join("");
}

// ---- Colours

// Text has at least this contrast with what it stands on, lines and areas the other.
const TEXT_CONTRAST = 4.5;
const MARK_CONTRAST = 3;

// What a colour means, on a light and on a dark page. What a colour says, a word or a shape says
// too. `palette` strengthens a colour where a page is neither white nor black.
const TEXT_COLOURS = {
  ink: ["#1a1a1a", "#ececec"],
  faint: ["#595959", "#b0b0b0"],
  link: ["#0b5fa5", "#7cc0f5"],
  problem: ["#a51d12", "#ff9d8f"],
};
const MARK_COLOURS = {
  line: ["#767676", "#8c8c8c"],
  focus: ["#0b5fa5", "#7cc0f5"],
  context: ["#2b8cc4", "#56b4e9"],
  own: ["#d55e00", "#e8762b"],
  dummy: ["#b9588f", "#d78cb5"],
  partial: ["#b87a00", "#e69f00"],
  full: ["#0072b2", "#3d9be0"],
  onlyHere: ["#00805c", "#2cc295"],
  onlyThere: ["#b3279b", "#f08bdc"],
  covered: ["#2b8cc4", "#56b4e9"],
  notCovered: ["#b87a00", "#e69f00"],
  never: ["#b9588f", "#d78cb5"],
  anchor: ["#d55e00", "#e8762b"],
  candidate: ["#767676", "#9a9a9a"],
  accepted: ["#2b8cc4", "#56b4e9"],
  corrected: ["#b87a00", "#e69f00"],
  bonus: ["#00805c", "#2cc295"],
  rejected: ["#c4311c", "#ff8a75"],
  raw: ["#c08600", "#e69f00"],
  scaled: ["#00609c", "#3d9be0"],
};

// [red, green, blue, alpha] of what computed styles and this file write.
function channels(colour) {
  if (colour.startsWith("#")) {
    const digits = colour.length === 4 ? colour.replace(/[0-9a-f]/gi, "$&$&") : colour;
    return [1, 3, 5].map((at) => parseInt(digits.slice(at, at + 2), 16)).concat(1);
  }
  const numbers = (colour.match(/-?[\d.]+(e-?\d+)?/g) ?? [0, 0, 0, 0]).map(Number);
  const unit = colour.startsWith("color(") ? 255 : 1;
  return [...numbers.slice(0, 3).map((one) => one * unit), numbers[3] ?? 1];
}

// Colour `over` laid on `under` with a share, as "#rrggbb".
function mixed(over, under, share) {
  const [top, bottom] = [channels(over), channels(under)];
  const digits = (i) => Math.round(share * top[i] + (1 - share) * bottom[i]).toString(16);
  return "#" + [0, 1, 2].map((i) => digits(i).padStart(2, "0")).join("");
}

// Relative luminance, from 0 for black to 1 for white.
function luminance(colour) {
  const linear = channels(colour).slice(0, 3).map((one) => {
    const share = one / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

// From 1 for equal colours to 21 for black on white.
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

// The colour, moved towards black or white until it has a contrast with what it stands on.
function readable(colour, paper, least = TEXT_CONTRAST) {
  const end = contrast("#000000", paper) > contrast("#ffffff", paper) ? "#000000" : "#ffffff";
  for (let share = 0; share < 1; share += 0.04) {
    const moved = mixed(end, colour, share);
    if (contrast(moved, paper) >= least) return moved;
  }
  return end;
}

// What an element stands on: all backgrounds behind it, up to the first that hides the rest.
function paperOf(el) {
  const layers = [];
  for (let one = el; one; one = one.parentElement ?? one.getRootNode().host) {
    const background = getComputedStyle(one).backgroundColor;
    const alpha = channels(background)[3];
    if (alpha > 0) layers.push([background, alpha]);
    if (alpha === 1) break;
  }
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const dark = scheme === "dark" || (scheme.includes("dark") && prefersDark);
  const canvas = dark ? "#121212" : "#ffffff";
  return layers.reduceRight((under, [over, alpha]) => mixed(over, under, alpha), canvas);
}

// The colours for the page that an element stands on. It measures: keep it until `onTheme` calls.
function palette(el) {
  const paper = paperOf(el);
  const dark = luminance(paper) < 0.18;
  const found = { dark, paper };
  for (const [colours, least] of [[TEXT_COLOURS, TEXT_CONTRAST], [MARK_COLOURS, MARK_CONTRAST]]) {
    for (const [name, pair] of Object.entries(colours)) {
      found[name] = readable(pair[dark ? 1 : 0], paper, least);
    }
  }
  return found;
}

// Calls when the theme that an element stands on has changed; returns what stops that.
function onTheme(el, call) {
  let paper = paperOf(el);
  const look = () => requestAnimationFrame(() => {
    if (!el.isConnected) return;
    const now = paperOf(el);
    if (now !== paper) call();
    paper = now;
  });
  // The head also holds the page's icon, which a notebook changes with every message.
  const styles = (change) => change.type === "attributes"
    || [...change.addedNodes, ...change.removedNodes].some(
      (one) => one.matches?.("style, link[rel~=stylesheet]"));
  const observer = new MutationObserver((changes) => changes.some(styles) && look());
  const options = { attributes: true };
  observer.observe(document.documentElement, options);
  if (document.body) observer.observe(document.body, options);
  // A theme's style sheet may arrive after the attributes that name it.
  observer.observe(document.head, { childList: true });
  document.head.addEventListener("load", look, true);
  const query = matchMedia("(prefers-color-scheme: dark)");
  query.addEventListener("change", look);
  return () => {
    observer.disconnect();
    document.head.removeEventListener("load", look, true);
    query.removeEventListener("change", look);
  };
}

// ---- Canvases, tips, spoken words

// A canvas that fills its box, sharp on every screen; `draw(context, width, height)` in CSS pixels
// is called at most once for each animation frame, after `redraw()` and when the box changes;
// `paint()` calls it at once. An `opaque` canvas is not cleared before, and quicker on the screen.
// `stop()` is for the widget's clean-up.
function canvasIn(el, draw, { opaque = false } = {}) {
  const canvas = node("canvas", { style: { display: "block", width: "100%", height: "100%" } });
  el.append(canvas);
  const context = canvas.getContext("2d", { alpha: !opaque });
  let [width, height, waiting] = [0, 0, 0];
  const paint = () => {
    cancelAnimationFrame(waiting);
    waiting = 0;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    const [columns, rows] = [Math.round(width * ratio), Math.round(height * ratio)];
    // Setting a size clears the canvas, even to the same one.
    if (canvas.width !== columns) canvas.width = columns;
    if (canvas.height !== rows) canvas.height = rows;
    context.setTransform(columns / width, 0, 0, rows / height, 0, 0);
    if (!opaque) context.clearRect(0, 0, width, height);
    draw(context, width, height);
  };
  const redraw = () => {
    waiting ||= requestAnimationFrame(paint);
  };
  // The box is not measured in each frame: that would lay out the page in its midst.
  const observer = new ResizeObserver(([{ contentRect }]) => {
    [width, height] = [Math.round(contentRect.width), Math.round(contentRect.height)];
    paint();
  });
  observer.observe(el);
  // Zooming the page changes the ratio, and mostly the box as well.
  window.addEventListener("resize", redraw);
  const stop = () => {
    cancelAnimationFrame(waiting);
    observer.disconnect();
    window.removeEventListener("resize", redraw);
  };
  return { canvas, redraw, paint, stop };
}

// A box of a few lines beside the pointer: `show(x, y, lines)` in CSS pixels of `el`, which it does
// not leave, and `hide()`. `el` must have a position of its own, such as "relative".
function tip(el) {
  const box = node("div", { "aria-hidden": "true", style: {
    position: "absolute", display: "none", zIndex: 5, pointerEvents: "none", maxWidth: "28em",
    padding: "4px 8px", borderRadius: "4px", font: "12px/1.45 var(--jp-ui-font-family, sans-serif)",
    whiteSpace: "pre-wrap", overflowWrap: "anywhere", boxShadow: "0 1px 5px rgba(0,0,0,.35)",
  } });
  el.append(box);
  let colours = palette(el);
  const stop = onTheme(el, () => {
    colours = palette(el);
  });
  const show = (x, y, lines) => {
    box.replaceChildren(...lines.map((line) => node("div", {}, line)));
    Object.assign(box.style, {
      display: "block", left: "0", top: "0", color: colours.ink, background: colours.paper,
      border: `1px solid ${colours.line}`,
    });
    const [width, height] = [box.offsetWidth, box.offsetHeight];
    // On the other side of the pointer where there is no room on its right or below it.
    const left = x + 14 + width <= el.clientWidth ? x + 14 : x - 14 - width;
    const top = y + 14 + height <= el.clientHeight ? y + 14 : y - 14 - height;
    box.style.left = `${Math.max(0, Math.min(left, el.clientWidth - width))}px`;
    box.style.top = `${Math.max(0, top)}px`;
  };
  const hide = () => {
    box.style.display = "none";
  };
  return { box, show, hide, stop };
}

// A region that a screen reader reads aloud when `say(text)` changes it; nobody sees it.
function speaker(el) {
  const region = node("div", { "aria-live": "polite", style: {
    position: "absolute", width: "1px", height: "1px", overflow: "hidden", clipPath: "inset(50%)",
    whiteSpace: "nowrap",
  } });
  el.append(region);
  const say = (text) => {
    if (region.textContent !== text) region.textContent = text;
  };
  return { region, say };
}

// ---- Files and the clipboard

// Hands bytes or text to the browser as a download.
function saveFile(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  node("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// Keeps keys pressed in a widget from being commands of the notebook around it.
function ownKeys(el) {
  el.setAttribute("data-lm-suppress-shortcuts", "true");
  el.addEventListener("keydown", (event) => event.stopPropagation());
}
