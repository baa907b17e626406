// Predicted against actual: panels of points with intervals, and the tokens of chosen bins.

// Series have these colours and marks wherever they are drawn.
const CHART_LOOKS = {
  raw: ["raw", "square", ""], scaled: ["scaled", "circle", ""],
  "on policy": ["scaled", "circle", ""], empirical: ["bonus", "diamond", "none"],
  predicted: ["raw", "square", "6 4"],
};
const CHART_SIZE = { width: 400, left: 46, right: 12, top: 26, bottom: 38 };

const CHART_STYLE = `
.dspark-chart { position: relative; font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--ink); }
.dspark-chart [hidden] { display: none !important; }
.dspark-chart-panels { display: flex; flex-wrap: wrap; gap: 8px 24px; }
.dspark-chart-panels > div { flex: 0 1 ${CHART_SIZE.width}px; min-width: 240px; }
.dspark-chart svg { display: block; width: 100%; height: auto; touch-action: pan-y;
  user-select: none; }
.dspark-chart :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.dspark-chart svg text { font-size: 12px; fill: var(--ink); }
.dspark-chart-line { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px;
  margin: 4px 0; }
.dspark-chart button { font: inherit; color: var(--ink); background: var(--field);
  border: 1px solid var(--line); border-radius: 3px; padding: 2px 9px; cursor: pointer; }
.dspark-chart-list { max-height: 300px; overflow: auto; border: 1px solid var(--line);
  border-radius: 4px; margin-top: 4px; }
.dspark-chart-list table { border-collapse: collapse; width: 100%; margin: 0; }
.dspark-chart-list :is(th, td) { background: var(--paper); font-weight: 400; text-align: left;
  padding: 2px 8px; border: 0; font-size: 12px; white-space: nowrap; }
.dspark-chart-list thead th { position: sticky; top: 0; border-bottom: 1px solid var(--line);
  color: var(--faint); }
.dspark-chart-list td.dspark-chart-where { white-space: pre-wrap; overflow-wrap: anywhere;
  min-width: 240px; font-family: var(--jp-code-font-family, monospace); }
.dspark-chart-where mark { color: var(--ink); background: var(--field);
  border: 1px solid var(--line); border-radius: 3px; padding: 0 2px; }
.dspark-chart-where span { color: var(--faint); }
`;

// ---- Charts, without a page

// The points of all panels that a brush over one panel, from x to x, holds; and of others none.
function brushed(panel, low, high) {
  const [from, to] = low < high ? [low, high] : [high, low];
  return panel.points.map((point, i) => [point.x, i])
    .filter(([x]) => x !== null && x >= from && x <= to).map(([, i]) => i);
}

// What stands beside a point, a line for each fact.
function pointFacts(panel, point) {
  const share = (one) => `${(100 * one).toFixed(1)} %`;
  const lines = [`${panel.name}, ${point.name}`];
  if (point.count !== undefined) lines.push(`${point.count.toLocaleString("en")} ${panel.noun}`);
  if (panel.diagonal) lines.push(`predicted ${share(point.x)}`);
  let actual = `${panel.diagonal ? "actual" : panel.value} ${share(point.y)}`;
  if (point.low !== null) actual += `, 95 % interval ${share(point.low)} to ${share(point.high)}`;
  lines.push(actual);
  if (panel.diagonal) {
    const gap = point.x - point.y;
    lines.push(`${gap > 0 ? "too sure" : "not sure enough"} by ${share(Math.abs(gap))}`);
  }
  return lines;
}

// The tokens of some bins of a panel, in the order of the table.
function listedTokens(list, bins) {
  if (!list) return { rows: [], leftOut: 0 };
  const chosen = new Set(bins);
  const rows = [...list.bin.keys()].filter((i) => chosen.has(list.bin[i]));
  const leftOut = bins.reduce((sum, bin) => sum + (list.left_out[bin] ?? 0), 0);
  return { rows, leftOut };
}

// ---- The page

function chartMark(kind, x, y, size, properties) {
  const half = size / 2;
  if (kind === "circle") return node("svg:circle", { cx: x, cy: y, r: half, ...properties });
  const square = { x: x - half, y: y - half, width: size, height: size, ...properties };
  if (kind === "diamond") square.transform = `rotate(45 ${x} ${y})`;
  return node("svg:rect", square);
}

function renderChart({ model, el }) {
  const root = node("div", { class: "dspark-chart" });
  addStyle(el, CHART_STYLE);
  el.append(root);
  ownKeys(root);
  const panels = node("div", { class: "dspark-chart-panels" });
  const note = node("span", {});
  const clear = node("button", { type: "button", onclick: () => choose(null) }, "Clear");
  const under = node("div", { class: "dspark-chart-line" }, note, clear);
  const list = node("div", {
    class: "dspark-chart-list", tabindex: 0, role: "region", "aria-label": "tokens of the bins",
  });
  root.append(panels, under, list);
  const hint = tip(root);
  const { say } = speaker(root);
  let state = {};
  let colours = palette(root);
  // Which panel and which of its points; where the keys are.
  let chosen = null;
  let focus = null;
  let drawn = [];

  const colour = () => {
    colours = palette(root);
    const named = {
      ink: colours.ink, faint: colours.faint, line: colours.line, focus: colours.focus,
      paper: colours.paper, field: mixed(colours.ink, colours.paper, 0.06),
    };
    for (const [name, one] of Object.entries(named)) root.style.setProperty(`--${name}`, one);
    draw();
  };

  const drawPanel = (panel, number) => {
    const { width, left, right, top, bottom } = CHART_SIZE;
    const inner = width - left - right;
    const height = panel.diagonal ? inner + top + bottom : 270;
    const tall = height - top - bottom;
    const [[x0, x1], [y0, y1]] = [panel.x_range, panel.y_range];
    const atX = (x) => left + (inner * (x - x0)) / (x1 - x0);
    const atY = (y) => top + tall * (1 - (y - y0) / (y1 - y0));
    const svg = node("svg:svg", {
      viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application",
      "aria-label": `${panel.name}: ${panel.points.length} points of ${panel.y_label} by ` +
        `${panel.x_label}. Arrow keys go through them, Enter chooses, Escape lets go.`,
    });
    const label = (x, y, words, more = {}) => node("svg:text", { x, y, ...more }, words);
    const line = (from, to, more) => node("svg:line", {
      x1: from[0], y1: from[1], x2: to[0], y2: to[1], stroke: colours.line, ...more,
    });
    svg.append(label(left, 15, panel.name, { "font-weight": 600 }));
    for (const tick of panel.y_ticks) {
      svg.append(line([left, atY(tick)], [width - right, atY(tick)], { "stroke-opacity": 0.3 }),
        label(left - 6, atY(tick) + 4, `${Math.round(100 * tick)}%`, { "text-anchor": "end" }));
    }
    for (const tick of panel.x_ticks) {
      svg.append(label(atX(tick), height - bottom + 16,
        panel.diagonal ? `${Math.round(100 * tick)}%` : String(tick), { "text-anchor": "middle" }));
    }
    svg.append(line([left, atY(y0)], [width - right, atY(y0)]), line([left, top], [left, atY(y0)]),
      label(left + inner / 2, height - 5, panel.x_label, { "text-anchor": "middle" }),
      label(width - right, 15, panel.y_label, { "text-anchor": "end", fill: colours.faint }));
    if (panel.diagonal) {
      svg.append(line([atX(0), atY(0)], [atX(1), atY(1)], { "stroke-dasharray": "2 4" }));
    }
    const brush = node("svg:rect", { y: top, height: tall, fill: colours.focus,
      "fill-opacity": 0.15, stroke: colours.focus, visibility: "hidden" });
    svg.append(brush);
    for (const name of new Set(panel.points.map((point) => point.look))) {
      const own = panel.points.filter((point) => point.look === name && point.y !== null);
      const [colourName, , dash] = CHART_LOOKS[name] ?? ["line", "circle", ""];
      if (dash === "none") continue;
      svg.append(node("svg:polyline", {
        points: own.map((point) => `${atX(point.x)},${atY(point.y)}`).join(" "), fill: "none",
        stroke: colours[colourName], "stroke-width": 1.5, "stroke-dasharray": dash || null,
      }));
    }
    const most = Math.max(1, ...panel.points.map((point) => point.count ?? 0));
    const marks = panel.points.map((point, i) => {
      if (point.y === null) return null;
      const [colourName, kind] = CHART_LOOKS[point.look] ?? ["line", "circle", ""];
      const [x, y] = [atX(point.x), atY(point.y)];
      const paint = colours[colourName];
      if (point.low !== null) {
        const ends = [[x, atY(point.low)], [x, atY(point.high)]];
        svg.append(line(...ends, { stroke: paint, "stroke-width": 1.5 }));
        for (const [, end] of ends) {
          svg.append(line([x - 3, end], [x + 3, end], { stroke: paint, "stroke-width": 1.5 }));
        }
      }
      const taken = chosen?.panel === number && chosen.points.includes(i);
      const size = panel.diagonal ? 6 + 9 * Math.sqrt((point.count ?? 0) / most) : 8;
      const mark = chartMark(kind, x, y, size, {
        fill: taken || kind !== "diamond" ? paint : colours.paper, "data-point": i,
        stroke: taken ? colours.ink : paint, "stroke-width": taken ? 3 : 1.5,
      });
      svg.append(mark);
      if (focus?.panel === number && focus.point === i) {
        svg.append(node("svg:circle", { cx: x, cy: y, r: size / 2 + 5, fill: "none",
          stroke: colours.focus, "stroke-width": 2 }));
      }
      return { x, y, size, i };
    }).filter(Boolean);
    follow(svg, panel, number, { marks, brush, atX, left, inner, x0, x1, width });
    return node("div", {}, svg);
  };

  // Pointer and keys over a panel.
  const follow = (svg, panel, number, at) => {
    const inside = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = at.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    };
    const nearest = ([x, y]) => {
      const by = at.marks.map((mark) => [Math.hypot(mark.x - x, mark.y - y), mark]);
      const [distance, mark] = by.reduce((one, other) => (other[0] < one[0] ? other : one),
        [Infinity, null]);
      return distance < 16 ? mark.i : null;
    };
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      from = inside(event)[0];
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = inside(event);
      if (from !== null && state.brush && Math.abs(x - from) > 4) {
        hint.hide();
        at.brush.setAttribute("x", Math.min(x, from));
        at.brush.setAttribute("width", Math.abs(x - from));
        at.brush.setAttribute("visibility", "visible");
        return;
      }
      const point = nearest([x, y]);
      if (point === null) {
        hint.hide();
        return;
      }
      const box = root.getBoundingClientRect();
      hint.show(event.clientX - box.left, event.clientY - box.top,
        pointFacts(panel, panel.points[point]));
    });
    svg.addEventListener("pointerleave", hint.hide);
    svg.addEventListener("pointercancel", () => {
      from = null;
      at.brush.setAttribute("visibility", "hidden");
    });
    svg.addEventListener("pointerup", (event) => {
      const [x, y] = inside(event);
      const begin = from;
      from = null;
      if (begin === null) return;
      const value = (one) => at.x0 + ((one - at.left) / at.inner) * (at.x1 - at.x0);
      if (state.brush && Math.abs(x - begin) > 4) {
        const points = brushed(panel, value(begin), value(x));
        choose(points.length ? { panel: number, points } : null);
        return;
      }
      const point = nearest([x, y]);
      choose(point === null ? null : { panel: number, points: [point] });
    });
    svg.addEventListener("keydown", (event) => {
      const known = at.marks.map((mark) => mark.i);
      const place = focus?.panel === number ? known.indexOf(focus.point) : -1;
      const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
      if (event.key in moves && known.length) {
        const next = Math.min(Math.max(place + moves[event.key], 0), known.length - 1);
        focus = { panel: number, point: known[next] };
        const facts = pointFacts(panel, panel.points[focus.point]).join(", ");
        if (event.shiftKey && chosen?.panel === number) {
          choose({ panel: number, points: [...new Set([...chosen.points, focus.point])] });
        } else draw();
        say(facts);
      } else if (event.key === "Enter" || event.key === " ") {
        if (focus?.panel === number) choose({ panel: number, points: [focus.point] });
      } else if (event.key === "Escape") choose(null);
      else return;
      event.preventDefault();
    });
  };

  const draw = () => {
    const active = drawn.indexOf(document.activeElement?.parentElement ?? null);
    const rooted = el.getRootNode().activeElement;
    const at = active >= 0 ? active : drawn.findIndex((one) => one.contains(rooted));
    drawn = (state.panels ?? []).map(drawPanel);
    panels.replaceChildren(...drawn);
    if (at >= 0 && drawn[at]) drawn[at].firstChild.focus({ preventScroll: true });
    fillList();
  };

  const fillList = () => {
    list.hidden = clear.hidden = !chosen || !state.brush;
    note.textContent = state.brush ? state.note ?? "" : "";
    if (!chosen || !state.brush) return;
    const panel = state.panels[chosen.panel];
    const bins = chosen.points.map((i) => panel.points[i].bin);
    const { rows, leftOut } = listedTokens(state.lists?.[panel.name], bins);
    const held = state.lists[panel.name];
    const whole = chosen.points.reduce((sum, i) => sum + panel.points[i].count, 0);
    const more = leftOut ? ` The list shows ${rows.length.toLocaleString("en")} of them.` : "";
    const names = chosen.points.map((i) => panel.points[i].name);
    const named = names.length > 1 ? `${names[0]} … ${names.at(-1)}` : names[0];
    const count = `${whole.toLocaleString("en")} ${panel.noun}`;
    note.textContent = `${panel.name}, ${named}: ${count}.${more}`;
    const head = ["in its text", "", "confidence", "prompt", "round.slot"];
    const row = (i) => node("tr", { "data-row": i },
      node("td", { class: "dspark-chart-where" },
        node("span", {}, held.before[i]), node("mark", {}, visible(held.text[i], 40)),
        ...(held.accepted[i] ? [] : [node("span", {}, ` → ${visible(held.said[i], 40)} `)]),
        node("span", {}, held.after[i])),
      node("td", {}, held.accepted[i] ? "✓ accepted" : "✗ rejected"),
      node("td", {}, held.confidence[i].toFixed(3)), node("td", {}, String(held.prompt[i])),
      node("td", {}, `${held.round[i]}.${held.slot[i]}`));
    list.replaceChildren(node("table", {},
      node("thead", {}, node("tr", {}, ...head.map((one) => node("th", { scope: "col" }, one)))),
      node("tbody", {}, ...rows.map(row))));
    list.scrollTop = 0;
  };

  const choose = (next) => {
    chosen = state.brush ? next : null;
    draw();
    say(chosen ? note.textContent : "nothing chosen");
    const panel = chosen && state.panels[chosen.panel];
    model.set("selection", chosen && {
      values: panel.name, bins: chosen.points.map((i) => panel.points[i].bin),
    });
    model.save_changes();
  };

  const show = () => {
    const before = JSON.stringify((state.panels ?? []).map((panel) => panel.points));
    state = model.get("state") ?? {};
    if (before !== JSON.stringify((state.panels ?? []).map((panel) => panel.points))) {
      chosen = focus = null;
    }
    draw();
    el.dataset.frame = state.frame ?? 0;
  };
  const stopTheme = onTheme(el, colour);
  colour();
  show();
  model.on("change:state", show);
  return () => {
    stopTheme();
    hint.stop();
    model.off("change:state", show);
  };
}
