// The panel of an explorer: its controls, a line for progress and problems, and its buttons.

const PANEL_STYLE = `
.dspark-panel { font: 13px/1.3 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--dspark-ink); position: relative; container-type: inline-size; }
.dspark-panel [hidden] { display: none !important; }
.dspark-controls { display: grid; grid-template-columns: repeat(auto-fill, minmax(248px, 1fr));
  gap: 3px 18px; margin: 2px 0 4px; }
.dspark-control { display: flex; align-items: center; gap: 6px; min-height: 26px; min-width: 0; }
.dspark-control.dspark-wide { grid-column: 1 / -1; align-items: start; }
.dspark-control > label { flex: 0 0 auto; min-width: 7.2em; text-align: right;
  overflow-wrap: anywhere; }
.dspark-control input[type=range] { flex: 1 1 60px; min-width: 40px;
  accent-color: var(--dspark-focus); }
.dspark-control input[type=number] { flex: 0 0 5.6em; width: 5.6em; }
.dspark-control select { flex: 1 1 auto; min-width: 0; }
.dspark-control select:disabled { flex: 0 0 auto; }
.dspark-control textarea { flex: 1 1 auto; resize: vertical; }
.dspark-panel :is(input, select, textarea, button) { font: inherit; color: var(--dspark-ink);
  background: var(--dspark-field); }
.dspark-panel :is(input[type=number], select, textarea, button) { border-radius: 3px;
  border: 1px solid var(--dspark-line); padding: 1px 5px; box-sizing: border-box; }
.dspark-panel input[type=checkbox] { width: 16px; height: 16px; margin: 0;
  accent-color: var(--dspark-focus); }
.dspark-panel :disabled { color: var(--dspark-faint); cursor: not-allowed; }
.dspark-panel button { cursor: pointer; padding: 2px 9px; }
.dspark-panel :focus-visible { outline: 2px solid var(--dspark-focus); outline-offset: 1px; }
.dspark-reason { flex: 1 1 60px; font-size: 12px; color: var(--dspark-faint);
  font-style: italic; }
.dspark-status { display: flex; align-items: center; gap: 8px; margin-bottom: 4px; }
/* Of one height whatever it says, so that the picture below it never moves. */
.dspark-line { flex: 1 1 0; min-width: 0; height: 40px; display: flex; align-items: center; }
.dspark-said, .dspark-words { max-height: 100%; overflow: auto; overflow-wrap: anywhere; }
.dspark-problem { color: var(--dspark-problem); border-left: 4px solid var(--dspark-problem);
  padding: 2px 8px; }
.dspark-progress { flex: 1 1 auto; display: flex; align-items: center; gap: 8px; min-width: 0;
  max-height: 100%; }
.dspark-progress progress { flex: 0 1 160px; min-width: 40px; height: 12px;
  accent-color: var(--dspark-focus); }
.dspark-buttons { display: flex; gap: 8px; }
@container (max-width: 700px) {
  .dspark-line { height: 54px; }
}
@container (max-width: 520px) {
  .dspark-status { flex-direction: column; align-items: stretch; gap: 2px; }
  .dspark-line { flex: 0 0 auto; }
}
.dspark-menu { position: absolute; right: 0; z-index: 6; display: flex; flex-direction: column;
  gap: 3px; padding: 6px; background: var(--dspark-paper); border: 1px solid var(--dspark-line);
  border-radius: 4px; box-shadow: 0 2px 8px rgba(0, 0, 0, .35); }
.dspark-menu button { text-align: left; }
.dspark-code { width: 100%; box-sizing: border-box; font: 12px/1.4 monospace; }
`;

const MOST_ON_THEIR_WAY = 2;

// Each panel of a page has a copy of this file, and its labels must find its own controls.
function newPanelName() {
  return `dspark-${Math.random().toString(36).slice(2)}`;
}

// ---- How a slider's positions stand for values

const numberOf = (text) => Number(text.replaceAll(",", ""));

// The whole numbers that a slider of a wide range stops at: all up to 16, then eight of each
// doubling, and both ends.
function growingStops(low, high) {
  const stops = [];
  for (let one = low; one < high;) {
    stops.push(one);
    const step = one < 16 ? 1 : 2 ** (Math.floor(Math.log2(one)) - 3);
    one = (Math.floor(one / step) + 1) * step;
  }
  return [...stops, high];
}

// A scale has the slider's `low`, `high` and `step(value)`, takes a value to a `position` and back
// with `value`, a number that was `typed` to a value, and `shows` a value as a number or words.
function scaleOf(spec) {
  if (spec.kind === "choice") return scaleOfChoice(spec);
  const inRange = (raw) => {
    const number = Math.min(Math.max(raw, spec.low), spec.high);
    return spec.kind === "whole" ? Math.round(number) : number;
  };
  const shows = (value) => Number(value.toFixed(4));
  const numbers = { least: spec.low, most: spec.high, typed: inRange, shows };
  return spec.growing ? scaleOfStops(spec, numbers) : {
    ...numbers, low: spec.low, high: spec.high, position: (value) => value, value: inRange,
    // A range has a grid, which a typed number need not lie on.
    step: (value) => (Number.isInteger(value / spec.step) ? spec.step : "any"),
  };
}

function scaleOfStops(spec, numbers) {
  const stops = growingStops(spec.low, spec.high);
  const position = (value) => {
    const next = stops.findIndex((stop) => stop >= value);
    if (stops[next] === value) return next;
    return next - (stops[next] - value) / (stops[next] - stops[next - 1]);
  };
  return {
    ...numbers, low: 0, high: stops.length - 1, position,
    value: (at) => stops[Math.round(at)],
    step: (value) => (Number.isInteger(position(value)) ? 1 : "any"),
  };
}

function scaleOfChoice({ labels }) {
  const words = labels.some((one) => Number.isNaN(numberOf(one)));
  const shows = (index) => (words ? labels[index] : numberOf(labels[index]));
  const typed = (raw) => {
    const distances = labels.map((one) => Math.abs(numberOf(one) - raw));
    return distances.indexOf(Math.min(...distances));
  };
  const high = labels.length - 1;
  return {
    low: 0, high, least: shows(0), most: shows(high), words, shows, typed,
    position: (index) => index, value: (at) => at, step: () => 1,
  };
}

// ---- Controls

// The inputs of a kind of control, the one that the label names first, and `show(spec, value)`.
// `take` is called with the value that a user gives them.
const INPUTS = {
  whole: sliderInputs, number: sliderInputs, choice: sliderInputs, list: listInputs,
  check: checkInputs, text: textInputs,
};

function sliderInputs(spec, id, take) {
  let scale = scaleOf(spec);
  const range = node("input", { type: "range", id });
  const typed = scale.words ? node("output", { for: id }) : node("input", {
    type: "number", autocomplete: "off", step: "any", "aria-label": `${spec.name}, typed`,
  });
  let shown = spec.value;
  const moved = () => scale.value(Number(range.value));
  const say = (value) => {
    typed.value = scale.shows(value);
    range.setAttribute("aria-valuetext", scale.shows(value));
  };
  range.addEventListener("input", () => (spec.continuous ? take(moved()) : say(moved())));
  if (!spec.continuous) range.addEventListener("change", () => take(moved()));
  typed.addEventListener("change", () => {
    const raw = Number(typed.value);
    if (typed.value === "" || Number.isNaN(raw)) say(shown);
    else take(scale.typed(raw));
  });
  const show = (next, value) => {
    shown = value;
    scale = scaleOf(next);
    Object.assign(range, { min: scale.low, max: scale.high, step: scale.step(value) });
    range.value = scale.position(value);
    if (!scale.words) Object.assign(typed, { min: scale.least, max: scale.most });
    say(value);
  };
  return { inputs: [range, typed], show };
}

function listInputs(spec, id, take) {
  const select = node("select", { id });
  select.addEventListener("change", () => take(select.selectedIndex));
  let labels = null;
  const show = (next, value) => {
    if (labels !== next.labels.join("\n")) {
      labels = next.labels.join("\n");
      select.replaceChildren(...next.labels.map((one) => node("option", {}, one)));
    }
    select.selectedIndex = value;
  };
  return { inputs: [select], show };
}

function checkInputs(spec, id, take) {
  const box = node("input", { type: "checkbox", id });
  box.addEventListener("change", () => take(box.checked));
  return { inputs: [box], show: (next, value) => { box.checked = value; } };
}

function textInputs(spec, id, take) {
  const area = node("textarea", { id, rows: 2 });
  area.addEventListener("change", () => take(area.value));
  return { inputs: [area], show: (next, value) => { area.value = value; } };
}

// One control: its element, `update(spec, keep)` from Python's state, and the `value()` that Python
// reads.
function controlElement(spec, id, changed) {
  let now = spec;
  let value = spec.value;
  const set = (next) => {
    value = next;
    show(now, value);
  };
  const { inputs, show } = INPUTS[spec.kind](spec, id, (next) => {
    set(next);
    changed();
  });
  const label = node("label", { for: id }, spec.name);
  const reason = node("span", { class: "dspark-reason", id: `${id}-reason` });
  const wide = spec.kind === "text" || spec.labels.some((one) => one.length > 40);
  const box = node("div", { class: "dspark-control" + (wide ? " dspark-wide" : "") },
    label, ...inputs, reason);
  let known = "";
  const update = (next, keep) => {
    // What looks as it is told is left alone: a move changes one control of many.
    const { value: given, ...others } = next;
    const before = known;
    known = JSON.stringify(others);
    if (known === before && (keep || given === value)) return;
    now = next;
    for (const input of inputs) {
      input.disabled = Boolean(next.reason);
      if (next.reason) input.setAttribute("aria-describedby", reason.id);
      else input.removeAttribute("aria-describedby");
    }
    reason.textContent = next.reason;
    reason.hidden = !next.reason;
    // The reason has the place of the slider.
    if (inputs[0].type === "range") inputs[0].hidden = Boolean(next.reason);
    set(keep ? value : given);
  };
  update(spec);
  return { box, update, value: () => value, set };
}

// The clipboard, and where there is none a field with the text selected.
async function copyText(text, place) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = node("textarea", { class: "dspark-code", rows: 2, readonly: true,
      "aria-label": "this view as code" });
    field.value = text;
    place.replaceChildren(field);
    field.select();
    return false;
  }
}

function render({ model, el }) {
  const name = newPanelName();
  const root = node("div", { class: "dspark-panel", role: "group", "aria-label": "controls" });
  addStyle(el, PANEL_STYLE);
  el.append(root);
  ownKeys(root);
  const grid = node("div", { class: "dspark-controls" });
  const said = node("div", { class: "dspark-said" });
  const bar = node("progress", { "aria-label": "progress" });
  const words = node("span", { "aria-live": "polite" });
  const counts = node("span");
  const button = (text, onclick, more = {}) =>
    node("button", { type: "button", onclick, ...more }, text);
  const cancel = button("Cancel", () => model.send({ action: "cancel" }));
  const progress = node("div", { class: "dspark-progress", hidden: true }, bar,
    node("span", { class: "dspark-words" }, words, " ", counts), cancel);
  const again = button("Try again", () => model.send({ action: "again" }), { hidden: true });
  const use = button("Use it", () => set(model.get("state").recommended), {
    hidden: true, title: "set the controls to what is recommended",
  });
  const reset = button("Reset", () => set(model.get("state").starts));
  const copy = button("Copy code", async () => {
    const place = node("div");
    if (await copyText(model.get("state").code, place)) note("The code is on the clipboard.");
    else said.replaceChildren(place);
    place.firstChild?.select();
  }, { title: "copy this view as code" });
  const menu = node("div", {
    class: "dspark-menu", role: "group", "aria-label": "save", hidden: true,
  });
  const save = button("Save", () => openMenu(menu.hidden), { "aria-expanded": "false" });
  const status = node("div", { class: "dspark-status" },
    node("div", { class: "dspark-line" }, progress, said),
    node("div", { class: "dspark-buttons" }, again, use, reset, copy, save));
  root.append(grid, status, menu);

  let controls = new Map();
  // Each change is a turn. Few turns are on their way to the kernel at once, so that a fast drag
  // neither queues nor waits for each picture; the last one is always sent.
  let [turn, onTheirWay] = [0, []];
  const send = () => {
    turn += 1;
    pass();
  };
  const pass = () => {
    const done = model.get("state").turn ?? 0;
    onTheirWay = onTheirWay.filter((one) => one > done);
    const sent = onTheirWay.at(-1) ?? done;
    if (sent >= turn || onTheirWay.length >= MOST_ON_THEIR_WAY) return;
    onTheirWay.push(turn);
    const values = Object.fromEntries([...controls].map(([name, one]) => [name, one.value()]));
    model.send({ action: "set", turn, values });
  };
  const set = (chosen) => {
    for (const [name, value] of Object.entries(chosen)) controls.get(name)?.set(value);
    send();
  };
  const note = (text) => said.replaceChildren(node("span", { role: "status" }, text));
  const openMenu = (open) => {
    menu.hidden = !open;
    save.setAttribute("aria-expanded", String(open));
    if (!open) return;
    menu.style.top = `${save.offsetTop + save.offsetHeight}px`;
    fillMenu([]);
    model.send({ action: "tables" });
    menu.querySelector("button")?.focus();
  };
  const entry = (text, message) => button(text, () => {
    openMenu(false);
    save.focus();
    note("The file is being made.");
    model.send({ action: "save", ...message });
  });
  const fillMenu = (tables) => {
    const pictures = model.get("state").picture ? ["svg", "png"] : [];
    menu.replaceChildren(
      ...pictures.map((what) => entry(`picture, ${what.toUpperCase()}`, { what })),
      entry("page, HTML: works without a kernel", { what: "html" }),
      ...tables.map((table) => entry(`table ${table}, CSV`, { what: "csv", table })),
    );
  };
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    openMenu(false);
    save.focus();
  });

  const show = () => {
    const state = model.get("state");
    const specs = state.controls ?? [];
    const names = specs.map((spec) => spec.name);
    if (names.join("\n") !== [...controls.keys()].join("\n")) {
      const made = (spec, i) => controlElement(spec, `${name}-${i}`, send);
      controls = new Map(specs.map((spec, i) => [spec.name, made(spec, i)]));
      grid.replaceChildren(...[...controls.values()].map((one) => one.box));
    } else {
      // What the user has set since then stays.
      const keep = (state.turn ?? 0) < turn;
      specs.forEach((spec) => controls.get(spec.name).update(spec, keep));
    }
    turn = Math.max(turn, state.turn ?? 0);
    for (const one of [reset, copy, save]) one.hidden = !specs.length;
    use.hidden = !Object.keys(state.recommended ?? {}).length;
    again.hidden = !state.again;
    if (state.problem) {
      const kept = state.kept ? " The picture is the last that could be drawn." : "";
      said.replaceChildren(node("div", { class: "dspark-problem", role: "alert" },
        `⚠ ${state.problem}${kept}`));
    } else if (said.querySelector("[role=alert]")) said.replaceChildren();
    el.dataset.turn = state.turn ?? 0;
    pass();
  };
  const showProgress = () => {
    const now = model.get("progress") ?? {};
    progress.hidden = now.words === undefined;
    said.hidden = !progress.hidden;
    if (progress.hidden) return;
    if (now.total > 0) {
      bar.max = now.total;
      bar.value = now.done;
    } else bar.removeAttribute("value");
    // Words that stay the same are not read aloud again.
    if (words.textContent !== now.words) words.textContent = now.words;
    counts.textContent = now.counts;
  };
  const receive = (message, buffers) => {
    if (message.tables) fillMenu(message.tables);
    if (!message.name) return;
    saveFile(message.name, message.type, buffers[0]);
    note(`${message.name} goes to your downloads.`);
  };
  const colour = () => {
    const colours = palette(el);
    const named = {
      ink: colours.ink, faint: colours.faint, line: colours.line, focus: colours.focus,
      problem: colours.problem, paper: colours.paper,
      field: mixed(colours.ink, colours.paper, 0.04),
    };
    for (const [name, value] of Object.entries(named)) {
      root.style.setProperty(`--dspark-${name}`, value);
    }
    root.style.colorScheme = colours.dark ? "dark" : "light";
  };
  const stopTheme = onTheme(el, colour);
  colour();
  show();
  showProgress();
  model.on("change:state", show);
  model.on("change:progress", showProgress);
  model.on("msg:custom", receive);
  return () => {
    stopTheme();
    model.off("change:state", show);
    model.off("change:progress", showProgress);
    model.off("msg:custom", receive);
  };
}

export default { render };
