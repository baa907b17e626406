// Predicted against actual: panels of points with intervals, and the tokens behind chosen points.
//
// A panel's points have keys. A choice is a column of the listed tokens and keys in it:
// { column: "raw_bin", keys: [3, 4] } are the tokens whose raw confidence lies in these bins.

// A series looks the same wherever it is drawn: a colour, a mark, a line's dashes, an open mark.
const CHART_LOOKS = {
  raw: ["raw", "square", "", true],
  scaled: ["scaled", "circle", "", false],
  "on policy": ["scaled", "circle", "", false],
  empirical: ["bonus", "diamond", "none", true],
  predicted: ["raw", "square", "6 4", false],
  accepted: ["bonus", "circle", "6 4", false],
};
const CHART_LOOK = ["scaled", "circle", "", false];
const CHART_MARGINS = { left: 48, right: 22, top: 24, bottom: 40 };
// Panels stand side by side as long as each has so many pixels.
const CHART_NARROWEST = 280;
const CHART_GAP = 20;
// So far from a point it is still meant, in pixels; a drag begins behind the other.
const CHART_REACH = 16;
const CHART_DRAG = 4;
// So many tokens are listed at once, each with as many tokens of its answer on both sides.
const CHART_ROWS = 200;
const CHART_AROUND = 8;

const CHART_STYLE = `
.dspark-chart { position: relative; font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--ink); }
.dspark-chart [hidden] { display: none !important; }
.dspark-chart ul { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 4px; padding: 0;
  list-style: none; }
.dspark-chart li { display: flex; align-items: center; gap: 6px; }
.dspark-chart-panels { display: flex; flex-wrap: wrap; align-items: flex-end;
  gap: 8px ${CHART_GAP}px; }
.dspark-chart svg { display: block; touch-action: pan-y; user-select: none; }
.dspark-chart svg:focus:not(:focus-visible) { outline: none; }
.dspark-chart :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.dspark-chart svg text { font-size: 12px; fill: var(--ink); }
.dspark-chart-line { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px;
  margin: 4px 0; }
.dspark-chart button { font: inherit; color: var(--ink); background: var(--field);
  border: 1px solid var(--line); border-radius: 3px; padding: 2px 9px; cursor: pointer; }
.dspark-chart-list { max-height: 300px; overflow: auto; border: 1px solid var(--line);
  border-radius: 4px; margin-top: 4px; }
.dspark-chart-list table { border-collapse: collapse; width: 100%; margin: 0; }
.dspark-chart-list :is(th, td) { background: var(--paper); color: var(--ink); font-weight: 400;
  text-align: left; padding: 2px 8px; border: 0; font-size: 12px; white-space: nowrap; }
.dspark-chart-list thead th { position: sticky; top: 0; border-bottom: 1px solid var(--line);
  color: var(--faint); }
.dspark-chart-list td:first-child { white-space: pre-wrap; overflow-wrap: anywhere;
  min-width: 220px; color: var(--faint); font-family: var(--jp-code-font-family, monospace); }
.dspark-chart-list mark { color: var(--ink); background: var(--field); border-radius: 3px;
  border: 1px solid var(--line); padding: 0 2px; }
.dspark-chart-list mark.no { border-style: dashed; text-decoration: line-through; }
`;

// ---- Charts, without a page

// The keys of a panel's points from one x to another.
function keysBetween(panel, one, other) {
  const [low, high] = one < other ? [one, other] : [other, one];
  const inside = panel.points.filter((point) => point.x >= low && point.x <= high);
  return [...new Set(inside.map((point) => point.key))];
}

// What is chosen, as far as the panels have it: { column, keys }, or null.
function chosenIn(panels, selection) {
  const panel = panels.find((one) => one.column && one.column === selection?.column);
  if (!panel || !Array.isArray(selection.keys)) return null;
  const wanted = new Set(selection.keys);
  const known = new Set(panel.points.map((point) => point.key));
  const keys = [...known].filter((one) => wanted.has(one));
  return keys.length ? { column: panel.column, keys } : null;
}

// The rows of the listed tokens that are chosen, in their order.
function listedRows(listed, chosen) {
  const column = listed[chosen.column] ?? [];
  const wanted = new Set(chosen.keys);
  return [...column.keys()].filter((i) => wanted.has(column[i]));
}

// A listed token in its answer: the texts before it, in its place, and behind it.
function inItsText(state, i) {
  const { prompt, position } = state.listed;
  const [answer, at] = [state.answers[prompt[i]], position[i]];
  return {
    before: answer.slice(Math.max(0, at - CHART_AROUND), at).join(""), said: answer[at],
    after: answer.slice(at + 1, at + 1 + CHART_AROUND).join(""),
  };
}

// The point that a key leads to: left and right along a series, up and down to another at its key.
function nextPoint(panel, from, key) {
  const { points } = panel;
  const last = points.length - 1;
  if (from === null) return last < 0 ? null : 0;
  const along = [...points.keys()].filter((i) => points[i].series === points[from].series);
  const across = [...points.keys()].filter((i) => points[i].key === points[from].key);
  const upright = key === "ArrowUp" || key === "ArrowDown";
  const line = upright && across.length > 1 ? across : along;
  const by = key === "ArrowRight" || key === (line === across ? "ArrowDown" : "ArrowUp") ? 1 : -1;
  if (key === "Home") return along[0];
  if (key === "End") return along.at(-1);
  return line[Math.min(Math.max(line.indexOf(from) + by, 0), line.length - 1)];
}

// ---- Drawing

// Where a panel's values lie in an SVG that is at most so wide.
function chartScale(panel, most) {
  const { left, right, top, bottom } = CHART_MARGINS;
  const width = Math.max(240, Math.min(panel.width, most));
  const inner = width - left - right;
  const tall = panel.square ? inner : panel.height - top - bottom;
  const [[x0, x1], [y0, y1]] = [panel.x_range, panel.y_range];
  return {
    left, top, inner, tall, width, height: tall + top + bottom,
    atX: (x) => left + (inner * (x - x0)) / (x1 - x0),
    atY: (y) => top + tall * (1 - (y - y0) / (y1 - y0)),
    xAt: (place) => x0 + ((place - left) / inner) * (x1 - x0),
  };
}

function chartMark(look, x, y, size, colours) {
  const [colour, kind, , open] = look;
  const paint = { fill: open ? colours.paper : colours[colour], stroke: colours[colour],
    "stroke-width": 1.8 };
  const half = size / 2;
  if (kind === "circle") return node("svg:circle", { cx: x, cy: y, r: half, ...paint });
  const transform = kind === "diamond" ? `rotate(45 ${x} ${y})` : null;
  const box = { x: x - half, y: y - half, width: size, height: size, transform };
  return node("svg:rect", { ...box, ...paint });
}

function chartLine(from, to, paint) {
  return node("svg:line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], ...paint });
}

function chartAxes(panel, at, colours) {
  const { left, top, inner, tall, height, atX, atY } = at;
  const [right, bottom] = [left + inner, top + tall];
  const words = (x, y, text, more) => node("svg:text", { x, y, ...more }, text);
  const strong = { stroke: colours.line };
  // A name that is wider than its place is cut; its point says it whole.
  const room = Math.floor(inner / panel.x_ticks.length / 7);
  const parts = panel.name ? [node("svg:tspan", { "font-weight": 600 }, panel.name), "   "] : [];
  return [
    ...panel.y_ticks.flatMap(([value, text]) => [
      chartLine([left, atY(value)], [right, atY(value)], { ...strong, "stroke-opacity": 0.3 }),
      words(left - 6, atY(value) + 4, text, { "text-anchor": "end" }),
    ]),
    ...panel.x_ticks.flatMap(([value, text]) => [
      chartLine([atX(value), bottom], [atX(value), bottom + 4], strong),
      words(atX(value), bottom + 17,
        text.length > room ? `${text.slice(0, Math.max(room - 1, 1))}…` : text,
        { "text-anchor": "middle" }),
    ]),
    chartLine([left, bottom], [right, bottom], strong),
    chartLine([left, top], [left, bottom], strong),
    words(left + inner / 2, height - 6, panel.x_label, { "text-anchor": "middle" }),
    node("svg:text", { x: 2, y: 14 }, ...parts,
      node("svg:tspan", { style: { fill: colours.faint } }, panel.y_label)),
    ...(panel.guide ? [chartLine([atX(panel.guide[0]), atY(panel.guide[1])],
      [atX(panel.guide[2]), atY(panel.guide[3])],
      { stroke: colours.ink, "stroke-dasharray": "2 4" })] : []),
  ];
}

// A panel as an element: its SVG, its marks, and what shows its focus, its choice and its brush.
function chartPanel(panel, most, colours) {
  const at = chartScale(panel, most);
  const keys = panel.column ? ", Enter lists their tokens, with Shift more, Escape lets go" : "";
  const svg = node("svg:svg", {
    width: at.width, height: at.height, viewBox: `0 0 ${at.width} ${at.height}`, tabindex: 0,
    role: "application", "aria-roledescription": "chart",
    "aria-label": `${panel.name} ${panel.y_label}, by ${panel.x_label}: ${panel.points.length} ` +
      `points. Arrow keys go through them${keys}.`,
  });
  const brush = node("svg:rect", { y: at.top, height: at.tall, fill: colours.focus,
    "fill-opacity": 0.15, stroke: colours.focus, visibility: "hidden" });
  const ring = node("svg:circle", { r: 11, fill: "none", stroke: colours.focus,
    "stroke-width": 2, visibility: "hidden" });
  svg.append(...chartAxes(panel, at, colours), brush);
  const looks = panel.series.map((one) => CHART_LOOKS[one.look] ?? CHART_LOOK);
  looks.forEach(([colour, , dash], series) => {
    if (dash === "none" || panel.lines === false) return;
    const own = panel.points.filter((point) => point.series === series);
    svg.append(node("svg:polyline", {
      points: own.map((point) => `${at.atX(point.x)},${at.atY(point.y)}`).join(" "), fill: "none",
      stroke: colours[colour], "stroke-width": 1.5, "stroke-dasharray": dash || null,
    }));
  });
  const marks = panel.points.map((point, i) => {
    const look = looks[point.series];
    const [x, y] = [at.atX(point.x), at.atY(point.y)];
    if (point.low !== null) {
      const paint = { stroke: colours[look[0]], "stroke-width": 1.5 };
      const [low, high] = [at.atY(point.low), at.atY(point.high)];
      const ends = [low, high].map((end) => chartLine([x - 3, end], [x + 3, end], paint));
      svg.append(chartLine([x, low], [x, high], paint), ...ends);
    }
    const mark = chartMark(look, x, y, point.size === undefined ? 8 : 6 + 9 * Math.sqrt(point.size),
      colours);
    mark.setAttribute("data-point", i);
    return { x, y, mark, plain: mark.getAttribute("fill"), full: colours[look[0]] };
  });
  svg.append(...marks.map(({ mark }) => mark), ring);
  // Chosen points are full and have a thick rim, the one at the keys a ring.
  const update = (chosen, focus) => {
    const held = new Set(chosen?.column === panel.column ? chosen?.keys : []);
    marks.forEach(({ mark, plain, full }, i) => {
      const taken = held.has(panel.points[i].key);
      mark.setAttribute("fill", taken ? full : plain);
      mark.setAttribute("stroke", taken ? colours.ink : full);
      mark.setAttribute("stroke-width", taken ? 3 : 1.8);
      mark.toggleAttribute("data-chosen", taken);
    });
    ring.setAttribute("visibility", focus === null ? "hidden" : "visible");
    if (focus !== null) {
      ring.setAttribute("cx", marks[focus].x);
      ring.setAttribute("cy", marks[focus].y);
    }
  };
  return { panel, svg, at, marks, brush, update };
}

function chartLegend(series, colours) {
  return node("ul", {}, ...series.map(({ name, look }) => {
    const own = CHART_LOOKS[look] ?? CHART_LOOK;
    const sign = node("svg:svg", { width: 30, height: 14, "aria-hidden": "true" });
    const paint = { stroke: colours[own[0]], "stroke-width": 1.5,
      "stroke-dasharray": own[2] || null };
    if (own[2] !== "none") sign.append(chartLine([0, 7], [30, 7], paint));
    sign.append(chartMark(own, 15, 7, 8, colours));
    return node("li", {}, sign, name);
  }));
}

// ---- The pointer

// Calls `at.point(i, event)` over a point, and null beside one, and `at.chosen(keys, more)` behind
// a click or a drag over a panel; `more` adds to what is chosen.
function followChart({ panel, svg, at, marks, brush }, on) {
  let from = null;
  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const nearest = (event) => {
    const [x, y] = place(event);
    let [best, least] = [null, CHART_REACH];
    marks.forEach((mark, i) => {
      const distance = Math.hypot(mark.x - x, mark.y - y);
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  };
  const dragged = (event) => panel.column && Math.abs(place(event)[0] - from) > CHART_DRAG;
  const stop = () => {
    from = null;
    brush.setAttribute("visibility", "hidden");
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    from = place(event)[0];
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (from === null || !dragged(event)) {
      on.point(nearest(event), event);
      return;
    }
    const [low, high] = [from, place(event)[0]].sort((a, b) => a - b);
    brush.setAttribute("x", Math.max(low, at.left));
    brush.setAttribute("width", Math.max(0, Math.min(high, at.left + at.inner) -
      Math.max(low, at.left)));
    brush.setAttribute("visibility", "visible");
    on.point(null, event);
  });
  svg.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const point = nearest(event);
    if (dragged(event)) on.chosen(keysBetween(panel, at.xAt(from), at.xAt(place(event)[0])), false);
    else on.chosen(point === null ? [] : [panel.points[point].key], event.shiftKey);
    stop();
  });
  svg.addEventListener("pointercancel", stop);
  svg.addEventListener("pointerleave", (event) => on.point(null, event));
}

// ---- The list

function chartRow(state, panel, i) {
  const { listed } = state;
  const { before, said, after } = inItsText(state, i);
  const line = (text) => text.replaceAll("\n", "⏎");
  const share = (value) => (value === null ? "–" : value.toFixed(3));
  const accepted = listed.accepted[i];
  const drafted = node("mark", { class: accepted ? "yes" : "no" }, visible(listed.text[i], 40));
  return node("tr", { "data-row": i },
    node("td", {}, line(before), drafted,
      accepted ? null : node("mark", {}, visible(said, 40)), line(after)),
    node("td", {}, accepted ? "✓ accepted" : "✗ rejected"),
    node("td", {}, share(listed[panel.confidence][i])),
    node("td", {}, share(listed.accept_rate[i])),
    ...["prompt", "round", "slot"].map((name) => node("td", {}, String(listed[name][i]))));
}

function chartTable(state, panel, rows) {
  const head = ["drafted token in its answer", "", "confidence", "accept rate", "prompt", "round",
    "slot"];
  return node("table", {},
    node("thead", {}, node("tr", {}, ...head.map((one) => node("th", { scope: "col" }, one)))),
    node("tbody", {}, ...rows.map((i) => chartRow(state, panel, i))));
}

// What is chosen in words: its points' names, the first and the last.
function chosenWords(panel, chosen, count) {
  const held = new Set(chosen.keys);
  const found = panel.points.filter((point) => held.has(point.key)).map((point) => point.name);
  const names = [...new Set(found)];
  const named = names.length > 2 ? [names[0], "…", names.at(-1)].join(" ") : names.join(" and ");
  const begin = panel.name ? `${panel.name}, ` : "";
  return `${begin}${named}: ${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;
}

// ---- The widget

function renderChart({ model, el }) {
  const root = node("div", { class: "dspark-chart" });
  addStyle(el, CHART_STYLE);
  el.append(root);
  ownKeys(root);
  const panels = node("div", { class: "dspark-chart-panels" });
  const note = node("span", {});
  const all = node("button", { type: "button" }, "Show all");
  const clear = node("button", { type: "button" }, "Clear");
  const list = node("div", { class: "dspark-chart-list", tabindex: 0, role: "region" });
  root.append(panels, node("div", { class: "dspark-chart-line" }, note, all, clear), list);
  const hint = tip(root);
  const { say } = speaker(root);
  let state = { panels: [], listed: {} };
  let colours = palette(root);
  let drawn = [];
  let chosen = null;
  // The panel and the point of the keys, and the point that is pointed at.
  let focus = null;
  let pointed = null;

  const choose = (column, keys) => {
    model.set("selection", keys.length ? { column, keys } : null);
    model.save_changes();
    // A page tells of a change at once, a notebook may not.
    update();
    say(chosen ? note.textContent : "nothing chosen");
  };
  const extended = (panel, keys, more) => {
    const held = more && chosen?.column === panel.column ? chosen.keys : [];
    return [...new Set([...held, ...keys])];
  };

  const follow = (one, number) => {
    const { panel, svg } = one;
    followChart(one, {
      point: (i, event) => {
        if (i === null) {
          hint.hide();
          pointed = null;
          return;
        }
        const box = root.getBoundingClientRect();
        const { facts } = panel.points[i];
        hint.show(event.clientX - box.left, event.clientY - box.top, facts);
        if (pointed !== `${number} ${i}`) say(facts.join(", "));
        pointed = `${number} ${i}`;
      },
      chosen: (keys, more) => {
        if (panel.column) choose(panel.column, extended(panel, keys, more));
      },
    });
    svg.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const here = focus?.number === number ? focus.point : null;
      if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
        const point = nextPoint(panel, here, event.key);
        if (point === null) return;
        focus = { number, point };
        const { key, facts } = panel.points[point];
        if (event.shiftKey && panel.column) choose(panel.column, extended(panel, [key], true));
        else update();
        say(facts.join(", "));
      } else if ((event.key === "Enter" || event.key === " ") && here !== null && panel.column) {
        choose(panel.column, extended(panel, [panel.points[here].key], event.shiftKey));
      } else if (event.key === "Escape") choose(null, []);
      else return;
      event.preventDefault();
    });
  };

  // What is chosen and where the keys are, on panels that stay.
  const update = () => {
    chosen = chosenIn(state.panels, model.get("selection"));
    drawn.forEach((one, number) =>
      one.update(chosen, focus?.number === number ? focus.point : null));
    fillList(CHART_ROWS);
  };

  const fillList = (most) => {
    list.hidden = clear.hidden = !chosen;
    all.hidden = true;
    const touchable = state.panels.some((panel) => panel.column);
    note.textContent = touchable
      ? "Click a point, or drag over several: their tokens are listed in their text." : "";
    list.replaceChildren();
    if (!chosen) return;
    const panel = state.panels.find((one) => one.column === chosen.column);
    const rows = listedRows(state.listed, chosen);
    const words = chosenWords(panel, chosen, rows.length);
    all.hidden = rows.length <= most;
    all.replaceChildren(`Show all ${rows.length.toLocaleString("en")}`);
    note.textContent = all.hidden ? words : `${words}, the first ${most} are listed`;
    list.setAttribute("aria-label", `tokens of ${words}`);
    list.append(chartTable(state, panel, rows.slice(0, most)));
  };
  all.addEventListener("click", () => {
    fillList(Infinity);
    list.focus({ preventScroll: true });
  });
  clear.addEventListener("click", () => choose(null, []));

  const draw = () => {
    const held = drawn.findIndex((one) => one.svg === el.getRootNode().activeElement);
    const room = root.clientWidth || 640;
    const share = (room - CHART_GAP * (state.panels.length - 1)) / state.panels.length;
    const most = share >= CHART_NARROWEST ? share : room;
    drawn = state.panels.map((panel) => chartPanel(panel, most, colours));
    drawn.forEach(follow);
    panels.replaceChildren(...drawn.map(({ panel, svg }) => node("div", {},
      panel.series.length > 1 ? chartLegend(panel.series, colours) : null, svg)));
    if (held >= 0 && drawn[held]) drawn[held].svg.focus({ preventScroll: true });
    update();
  };

  const colour = () => {
    colours = palette(root);
    const named = {
      ink: colours.ink, faint: colours.faint, line: colours.line, focus: colours.focus,
      paper: colours.paper, field: mixed(colours.ink, colours.paper, 0.06),
    };
    for (const [name, one] of Object.entries(named)) root.style.setProperty(`--${name}`, one);
    draw();
  };

  const show = () => {
    const next = model.get("state") ?? {};
    if (next.show !== "chart") return;
    const scrolled = list.scrollTop;
    state = next;
    // The keys stay where they are as long as there is a point.
    const point = state.panels[focus?.number]?.points[focus?.point];
    if (!point) focus = null;
    hint.hide();
    draw();
    list.scrollTop = scrolled;
    el.dataset.frame = state.frame ?? 0;
  };
  let width = 0;
  const resized = new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    draw();
  });
  const stopTheme = onTheme(el, colour);
  show();
  colour();
  resized.observe(root);
  model.on("change:state", show);
  model.on("change:selection", update);
  return () => {
    stopTheme();
    hint.stop();
    resized.disconnect();
    model.off("change:state", show);
    model.off("change:selection", update);
  };
}
