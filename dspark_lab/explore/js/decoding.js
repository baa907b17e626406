// An answer as it was decoded: its rounds in colour, played one by one, and each slot in place.

// As Python counts them.
const OUTCOMES = [
  "accepted", "rejected", "not reached", "not verified", "corrected", "bonus", "first",
];
const SAID = new Set(["accepted", "corrected", "bonus", "first"]);
const OUTCOME_WORDS = {
  accepted: "drafted, and the target agreed",
  rejected: "drafted, and refused by the target: not said",
  "not reached": "drafted behind a refused token: not said",
  "not verified": "drafted, but the target was not asked: not said",
  corrected: "the target's own, in place of a refused token",
  bonus: "one more of the target's own, as nothing was refused",
  first: "the target's own, with the reading of the prompt",
};
const OUTCOME_COLOURS = {
  accepted: "accepted", rejected: "rejected", "not reached": "rejected", "not verified": "faint",
  corrected: "corrected", bonus: "bonus", first: "faint",
};
const PLAY_SECONDS = 0.6;

const ANSWER_STYLE = `
.dspark-answer { position: relative; font: 13px/1.4 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--ink); }
.dspark-answer [hidden] { display: none !important; }
.dspark-answer :is(button, label) { font: inherit; color: var(--ink); }
.dspark-answer button { background: var(--field); border: 1px solid var(--line);
  border-radius: 3px; padding: 2px 9px; cursor: pointer; }
.dspark-answer button:disabled { color: var(--faint); cursor: default; }
.dspark-answer :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.dspark-answer-line { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px;
  margin: 4px 0; }
.dspark-answer-words { font-weight: 600; }
.dspark-answer-legend { display: flex; flex-wrap: wrap; gap: 4px 8px; margin: 4px 0; padding: 0;
  list-style: none; font-size: 12px; align-items: center; }
.dspark-answer-legend li { padding: 1px 6px; border-radius: 3px; }
.dspark-answer-rounds { height: 62px; overflow-x: auto; overflow-y: hidden; }
.dspark-answer-asked { color: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 5.6em; overflow-y: auto; margin: 4px 0; }
.dspark-answer-text { font: 14px/2 var(--jp-code-font-family, monospace); white-space: pre-wrap;
  overflow-wrap: anywhere; padding: 2px 4px; min-height: 28px; max-height: 70vh;
  overflow: hidden auto; position: relative; box-sizing: border-box; }
.dspark-word { border-radius: 3px; padding: 2px 0; cursor: pointer;
  border-bottom: 2px solid transparent; box-shadow: inset 1px 0 var(--paper); }
.dspark-word:hover, .dspark-word-chosen { outline: 2px solid var(--focus); outline-offset: -1px; }
.dspark-word.corrected { border-bottom-style: solid; }
.dspark-word.bonus { border-bottom-style: dotted; }
.dspark-word.first { border-bottom-style: double; border-bottom-width: 4px; }
.dspark-word.drafted { border: 1px dashed var(--line); }
.dspark-vain { font-size: 12px; border: 1px dashed var(--faint); border-radius: 4px;
  margin: 0 5px; padding: 2px 4px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.dspark-vain-name { color: var(--faint); font: italic 11px var(--jp-ui-font-family, sans-serif); }
.dspark-vain .dspark-word { font-style: italic; margin-left: 3px; box-shadow: none; }
.dspark-slot { display: inline-block; width: 100%; box-sizing: border-box; white-space: normal;
  vertical-align: top; margin: 4px 0 6px; padding: 6px 10px; border: 1px solid var(--line);
  border-left: 4px solid var(--focus); border-radius: 4px; background: var(--field);
  font: 13px/1.5 var(--jp-ui-font-family, system-ui, sans-serif); }
.dspark-slot h3 { font-size: 13px; margin: 0; flex: 1 1 auto; }
.dspark-slot table { border-collapse: collapse; margin-top: 4px; width: 100%; max-width: 760px; }
.dspark-slot :is(th, td) { background: none; font-weight: 400; text-align: right;
  padding: 1px 6px; font-size: 12px; border: 0; white-space: nowrap; }
.dspark-slot :is(th, td):first-child { text-align: left; font-family: monospace; }
.dspark-slot .dspark-pair { width: 40%; min-width: 110px; padding: 2px 6px; text-align: left; }
.dspark-share { position: relative; height: 8px; margin: 1px 0; }
.dspark-share > div { position: absolute; inset: 0 auto 0 0; box-sizing: border-box; }
.dspark-swatch { display: inline-block; width: 16px; height: 8px; margin: 0 4px; }
.dspark-slot p { margin: 4px 0 0; }
`;

// ---- The answer, without a page

// The tokens and rounds of a state. A token's `slot` is where it was decided; -1 for the first.
function readAnswer(state) {
  const columns = state.tokens ?? { round: [] };
  const tokens = columns.round.map((round, i) => ({
    i, round, own: columns.slot[i] < 0, slot: columns.slot[i], position: columns.position[i],
    text: columns.text[i], outcome: OUTCOMES[columns.outcome[i]],
    confidence: columns.confidence[i], acceptRate: columns.accept_rate[i],
    acceptProb: columns.accept_prob[i], draftProb: columns.draft_prob[i],
    targetProb: columns.target_prob[i],
  }));
  const rounds = [];
  for (const token of tokens) {
    token.said = SAID.has(token.outcome);
    if (token.round < 0) continue;
    const round = (rounds[token.round] ??= { number: token.round, drafted: [], own: null });
    if (token.own) round.own = token;
    else round.drafted.push(token);
  }
  for (const round of rounds) {
    round.accepted = round.drafted.filter((one) => one.said).length;
    round.verified = round.drafted.filter((one) => one.outcome !== "not verified").length;
    // The target's own token stands where the first draft was refused, or behind them all.
    if (round.own) round.own.slot = round.accepted;
  }
  return { tokens, rounds };
}

// What is shown at a step: `step` 0 shows the first token, each round takes two, its draft and its
// verdict. A null step shows all. Returns [token, "said", "vain" or "drafted"] one by one.
function shownAt(answer, step, drafts) {
  const last = 2 * answer.rounds.length;
  const at = step ?? last;
  const shown = [];
  for (const token of answer.tokens) {
    const verdict = 2 * token.round + 2;
    if (token.round < 0 || at >= verdict) {
      if (token.said) shown.push([token, "said"]);
      else if (drafts || (step !== null && at === verdict)) shown.push([token, "vain"]);
    } else if (at === verdict - 1 && !token.own) shown.push([token, "drafted"]);
  }
  return shown;
}

// The round that is drafted or judged at a step; -1 at the first token, and where all is shown.
function roundAtStep(step) {
  return Math.ceil((step ?? 0) / 2) - 1;
}

// The slots that can be chosen, in reading order: [round, slot], the first token as [-1, -1].
function slotsOf(answer) {
  const first = answer.tokens.some((token) => token.round < 0) ? [[-1, -1]] : [];
  return first.concat(answer.rounds.flatMap((round) =>
    Array.from({ length: lastSlot(round) + 1 }, (_, slot) => [round.number, slot])));
}

// The last slot with a distribution: the bonus slot counts, where all were verified.
function lastSlot(round) {
  return Math.max(round.drafted.length - 1, round.verified);
}

// A selection of the model as [round, slot]; null where this answer has no such slot.
function slotHeld(answer, held) {
  const known = held && slotsOf(answer).some(([round, slot]) =>
    round === held.round && slot === held.slot);
  return known ? [held.round, held.slot] : null;
}

// Where a key leads while the answer is played: draft and verdict one by one, or to a round's end.
function nextStep(answer, step, key) {
  const end = 2 * answer.rounds.length;
  const to = {
    ArrowRight: step + 1, ArrowLeft: step - 1, Home: 0, End: end,
    ArrowDown: 2 * Math.floor(step / 2) + 2, ArrowUp: 2 * Math.ceil(step / 2) - 2,
  }[key];
  return Math.min(Math.max(to, 0), end);
}

// Where a key leads: to the slot before or behind, or to a round, where it was decided.
function nextSlot(answer, chosen, key) {
  const slots = slotsOf(answer);
  const decided = (number) => {
    const round = answer.rounds[Math.min(Math.max(number, 0), answer.rounds.length - 1)];
    return round ? [round.number, round.accepted] : slots[0];
  };
  if (key === "Home") return slots[0];
  if (key === "End") return decided(answer.rounds.length - 1);
  if (!chosen) return key === "ArrowLeft" || key === "ArrowUp" ? slots.at(-1) : decided(0);
  if (key === "ArrowDown") return decided(chosen[0] + 1);
  if (key === "ArrowUp") return chosen[0] <= 0 ? slots[0] : decided(chosen[0] - 1);
  const at = slots.findIndex(([round, slot]) => round === chosen[0] && slot === chosen[1]);
  return slots[Math.min(Math.max(at + (key === "ArrowRight" ? 1 : -1), 0), slots.length - 1)];
}

function decimals(number, digits = 2) {
  return number === null || number === undefined ? "unknown" : number.toFixed(digits);
}

// What is known of a token, a line for each.
function tokenFacts(token) {
  const place = token.round < 0 ? "first token" : token.own ? `round ${token.round}`
    : `round.slot ${token.round}.${token.slot}`;
  const lines = [`${visible(token.text, 40)}   ${place}`,
    `${token.outcome}: ${OUTCOME_WORDS[token.outcome]}`];
  const pairs = [
    [["confidence", token.confidence], ["accept rate", token.acceptRate]],
    [["draft probability", token.draftProb], ["target probability", token.targetProb]],
  ];
  for (const pair of pairs) {
    const known = pair.filter(([, value]) => value !== null);
    if (known.length) lines.push(known.map(([name, one]) => `${name} ${decimals(one)}`).join(", "));
  }
  return lines;
}

function roundFacts(round) {
  const end = round.own ? `then ${round.own.outcome} ${visible(round.own.text)}` : "the end";
  return `round ${round.number}: drafted ${round.drafted.length}, verified ${round.verified}, ` +
    `accepted ${round.accepted}, ${end}`;
}

// ---- The page

// The table of both distributions at a slot, as Python sent them.
function distributionTable(slot) {
  const asked = slot.target !== null;
  const most = Math.max(...slot.draft, ...(asked ? slot.target : [0]), 1e-9);
  const width = (share) => `${(100 * share) / most}%`;
  const filled = (kind) => ({ background: kind === "draft"
    ? "repeating-linear-gradient(135deg, var(--draft) 0 3px, var(--draft-tint) 3px 6px)"
    : "var(--target)", outline: `1px solid var(--${kind})`, outlineOffset: "-1px" });
  const swatch = (kind) => node("span", { class: "dspark-swatch", style: filled(kind) });
  const bar = (kind, whole, overlap) => node("div", { class: "dspark-share" },
    overlap > 0 && node("div", { style: { width: width(overlap), ...filled(kind) } }),
    node("div", { style: { width: width(whole), border: `1.5px solid var(--${kind})` } }));
  const head = ["token", [swatch("draft"), "draft ", swatch("target"), "target"],
    "draft", "target", "overlap", "residual", ""];
  const rows = slot.ids.map((id, i) => {
    const marks = [i === slot.drafted && "drafted", i === slot.drawn && "drawn by the target"];
    const overlap = asked ? slot.overlap[i] : 0;
    const pair = node("td", { class: "dspark-pair", "aria-hidden": "true" },
      bar("draft", slot.draft[i], overlap), asked && bar("target", slot.target[i], overlap));
    const number = (values) => node("td", {}, values ? decimals(values[i], 3) : "");
    const name = id < 0 ? slot.texts[i] : visible(slot.texts[i], 24) || `(id ${id})`;
    return node("tr", { "data-id": id },
      node("th", { scope: "row", title: id < 0 ? null : `id ${id}` }, name), pair,
      ...["draft", "target", "overlap", "residual"].map((key) => number(slot[key])),
      node("td", { style: { textAlign: "left" } }, marks.filter(Boolean).join(", ")));
  });
  return node("table", { "aria-label": "both distributions" },
    node("thead", {}, node("tr", {}, ...head.map((one, i) =>
      node("th", { scope: "col", class: i === 1 ? "dspark-pair" : null }, one)))),
    node("tbody", {}, ...rows));
}

// The card of a slot: who drafted and drew what, how sure, and both distributions.
function slotCard(answer, state, chosen, steer) {
  const [number, slot] = chosen;
  const button = (text, name, onclick) =>
    node("button", { type: "button", "aria-label": name, title: name, onclick }, text);
  const buttons = [
    button("◀", "slot before", () => steer("ArrowLeft")),
    button("▶", "next slot", () => steer("ArrowRight")),
    button("✕", "close", () => steer("Escape")),
  ];
  const card = (title, ...content) => node("div", {
    class: "dspark-slot", role: "group", "aria-label": title,
    "data-round": number, "data-slot": slot,
  }, node("div", { class: "dspark-answer-line" }, node("h3", {}, title), ...buttons), ...content);
  if (number < 0) {
    return card("the first token",
      node("p", {}, "The target drew it when it had read the prompt; nothing was drafted for it."));
  }
  const round = answer.rounds[number];
  const drafted = round.drafted[slot];
  const own = round.own?.slot === slot ? round.own : null;
  const outcome = [drafted?.outcome, own?.outcome].filter(Boolean).join(", ") || "nothing drawn";
  const facts = [];
  if (drafted) {
    facts.push(`drafted ${visible(drafted.text, 24)}`);
    if (drafted.confidence !== null) facts.push(`confidence ${decimals(drafted.confidence, 3)}`);
    if (drafted.acceptRate !== null) {
      facts.push(`accept rate ${decimals(drafted.acceptRate, 3)}`);
      facts.push(`draft probability ${decimals(drafted.draftProb, 3)}`);
      facts.push(`target probability ${decimals(drafted.targetProb, 3)}`);
      facts.push(`accepted with probability ${decimals(drafted.acceptProb, 3)}`);
    }
  } else facts.push("nothing drafted");
  if (own) facts.push(`drawn by the target ${visible(own.text, 24)}`);
  const title = `round ${number}, slot ${slot}: ${outcome}`;
  const held = state.slots?.[number]?.[slot];
  const content = [node("p", {}, facts.join(" · "))];
  if (!held) {
    content.push(node("p", { style: { color: "var(--faint)" } }, state.running
      ? "The distributions come when the answer is whole."
      : "The distributions of this answer were not kept."));
    return card(title, ...content);
  }
  const asked = held.target !== null;
  const overlap = asked ? held.overlap.reduce((sum, one) => sum + one, 0) : null;
  content.push(distributionTable(held), node("p", { style: { color: "var(--faint)" } },
    !asked ? "The target was not asked here."
      : slot >= round.verified ? "The bonus slot: the target draws from its own distribution."
        : `Filled: the overlap, in all ${decimals(overlap, 3)}, the accept rate. Residual: what ` +
          "is drawn from where the draft is refused."));
  return card(title, ...content);
}

// Rounds from left to right, a cell for each slot from the bottom up.
function drawRounds(context, height, answer, colours, marked, column) {
  const most = Math.max(1, ...answer.rounds.map((round) => round.drafted.length + 1));
  const cell = Math.min(9, (height - 16) / most);
  context.font = "10px system-ui, sans-serif";
  context.fillStyle = colours.faint;
  answer.rounds.forEach((round, i) => {
    const x = 2 + i * column;
    const box = (at, colour, filled) => {
      const y = height - 15 - (at + 1) * cell;
      const rect = [x + 1.5, y + 1, column - 4, Math.max(cell - 2, 1)];
      context.fillStyle = context.strokeStyle = colour;
      context.lineWidth = 1;
      if (filled) context.fillRect(...rect);
      else context.strokeRect(rect[0] + 0.5, rect[1] + 0.5, rect[2] - 1, Math.max(rect[3] - 1, 1));
    };
    for (let at = 0; at < round.accepted; at++) box(at, colours.accepted, true);
    if (round.own) box(round.accepted, colours[round.own.outcome], true);
    const from = round.accepted + (round.own ? 1 : 0);
    for (let at = from; at < round.drafted.length; at++) box(at, colours.line, false);
    if (i === marked) {
      context.strokeStyle = colours.focus;
      context.lineWidth = 2;
      context.strokeRect(x, 2, column - 1, height - 15);
    }
    const every = Math.max(1, Math.ceil(26 / column));
    context.fillStyle = colours.faint;
    if (i % every === 0) context.fillText(String(i), x + 1, height - 4);
  });
}

function renderAnswer({ model, el }) {
  const root = node("div", { class: "dspark-answer" });
  addStyle(el, ANSWER_STYLE);
  el.append(root);
  ownKeys(root);
  const words = node("span", { class: "dspark-answer-words" });
  const asked = node("div", { class: "dspark-answer-asked" });
  const button = (text, name, onclick) =>
    node("button", { type: "button", title: name, "aria-label": name, onclick }, text);
  const play = button("▶ Play", "play the rounds (space)", () => toggle());
  const back = button("◀ Round", "a round back (arrow up)", () => steer("ArrowUp"));
  const on = button("Round ▶", "a round on (arrow down)", () => steer("ArrowDown"));
  const all = button("Whole answer", "show the whole answer", () => goTo(null));
  const vain = node("input", { type: "checkbox", onchange: () => layOut() });
  const place = node("span", { style: { color: "var(--faint)" } });
  const bar = node("div", { class: "dspark-answer-line" }, play, back, on, all,
    node("label", {}, vain, " drafts in vain"), place);
  const strip = node("div", { class: "dspark-answer-rounds" });
  const stripBox = node("div", { style: { height: "100%" } });
  strip.append(stripBox);
  const legend = node("ul", { class: "dspark-answer-legend", "aria-label": "outcomes" });
  const text = node("div", { class: "dspark-answer-text", tabindex: 0, role: "application" });
  root.append(node("div", { class: "dspark-answer-line" }, words), asked, bar, strip, legend, text);
  const hint = tip(root);
  const { say } = speaker(root);

  let state = {};
  let answer = readAnswer(state);
  let colours = palette(root);
  let step = null;
  let timer = 0;
  let chosen = null;
  let spans = [];
  let column = 14;

  const canvas = canvasIn(stripBox, (context, width, height) =>
    drawRounds(context, height, answer, colours, chosen ? chosen[0] : roundAtStep(step), column));
  canvas.canvas.setAttribute("role", "img");

  const tint = (name) => mixed(colours[name], colours.paper, 0.24);
  const colour = () => {
    colours = palette(root);
    const named = {
      ink: colours.ink, faint: colours.faint, line: colours.line, focus: colours.focus,
      paper: colours.paper, draft: colours.raw, target: colours.scaled,
      field: mixed(colours.ink, colours.paper, 0.04), "draft-tint": tint("raw"),
    };
    for (const [name, one] of Object.entries(named)) root.style.setProperty(`--${name}`, one);
    root.style.colorScheme = colours.dark ? "dark" : "light";
    layOut();
  };

  // How a token of an outcome looks: a tint, ink that is read on it, and a line of its own.
  const look = (outcome, how) => {
    if (how === "drafted") return { color: colours.ink };
    const name = OUTCOME_COLOURS[outcome];
    if (how === "vain") return { color: readable(colours[name], colours.paper) };
    const background = tint(name);
    const line = readable(colours[name], background, MARK_CONTRAST);
    const signed = ["corrected", "bonus", "first"].includes(outcome);
    return { background, color: readable(colours.ink, background),
      ...(signed ? { borderBottomColor: line } : {}) };
  };

  const isChosen = (token) => chosen && token.round === chosen[0] && token.slot === chosen[1];

  const tokenSpan = (token, how) => {
    const end = how === "said" ? "⏎\n" : "⏎";
    const shown = token.text.replaceAll("\t", "⇥").replaceAll("\n", end);
    const sign = how === "vain" && token.outcome === "rejected" ? "✗ " : "";
    const made = node("span", {
      class: `dspark-word ${how === "said" ? token.outcome : how}`, "data-i": token.i,
      style: look(token.outcome, how),
    }, sign + (shown || "·"));
    if (isChosen(token)) made.classList.add("dspark-word-chosen");
    return made;
  };

  const layOut = () => {
    const parts = [];
    let group = null;
    for (const [token, how] of shownAt(answer, step, vain.checked)) {
      const made = tokenSpan(token, how);
      if (how === "vain") {
        if (!group) {
          group = node("span", { class: "dspark-vain" },
            node("span", { class: "dspark-vain-name" }, "not said:"));
          parts.push(group);
        }
        group.append(made);
      } else {
        group = null;
        parts.push(made);
      }
    }
    const top = text.scrollTop;
    text.replaceChildren(...parts);
    spans = [...text.querySelectorAll(".dspark-word")];
    text.scrollTop = top;
    putCard();
    canvas.redraw();
  };

  // The card stands under the line in which its token does.
  const putCard = () => {
    text.querySelector(".dspark-slot")?.remove();
    if (!chosen) return;
    const card = slotCard(answer, state, chosen, steer);
    const marked = spans.filter((span) => span.classList.contains("dspark-word-chosen"));
    const token = marked.at(-1) ?? spans.filter((span) => {
      const one = answer.tokens[Number(span.dataset.i)];
      return one.round < chosen[0] || (one.round === chosen[0] && one.slot <= chosen[1]);
    }).at(-1);
    if (!token) {
      text.append(card);
      return;
    }
    const bottom = [...token.getClientRects()].at(-1)?.bottom ?? 0;
    let before = token.closest(".dspark-vain") ?? token;
    do before = before.nextElementSibling;
    while (before && [...before.getClientRects()].at(-1)?.top < bottom - 4);
    if (before) before.before(card);
    else text.append(card);
  };

  const choose = (next, quiet = false) => {
    chosen = next;
    layOut();
    const chosenSpan = text.querySelector(".dspark-word-chosen");
    const card = text.querySelector(".dspark-slot");
    if (chosenSpan) {
      const box = text.getBoundingClientRect();
      const low = (card ?? chosenSpan).getBoundingClientRect().bottom;
      if (low > box.bottom) text.scrollTop += low - box.bottom;
      const high = chosenSpan.getBoundingClientRect().top;
      if (high < box.top) text.scrollTop -= box.top - high;
    }
    if (quiet) return;
    if (!next) say("closed");
    else if (next[0] < 0) say("the first token");
    else {
      const token = answer.tokens.find((one) => isChosen(one));
      say([card.getAttribute("aria-label"), ...(token ? tokenFacts(token) : [])].join(". "));
    }
    const selection = next ? { round: next[0], slot: next[1] } : null;
    model.set("selection", selection);
    model.save_changes();
  };

  const goTo = (next) => {
    // What lies below stays where it is, while the answer is shorter.
    if (step === null && next !== null) text.style.minHeight = `${text.offsetHeight}px`;
    if (next === null) text.style.minHeight = "";
    step = next;
    const last = answer.rounds.length - 1;
    if (step === null || step > 2 * last + 1) stop();
    all.disabled = step === null;
    const round = answer.rounds[roundAtStep(step)];
    const drafted = round?.drafted.length;
    place.textContent = step === null ? "" : !round ? "the first token"
      : `round ${round.number} of 0 to ${last}: ` +
        (step % 2 ? `drafted ${drafted}` : `accepted ${round.accepted} of ${drafted}`);
    if (round && step % 2 === 0) say(roundFacts(round));
    layOut();
    if (step !== null) text.scrollTop = text.scrollHeight;
  };

  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.replaceChildren("▶ Play");
  };

  const toggle = () => {
    if (timer) {
      stop();
      return;
    }
    if (!answer.rounds.length) return;
    if (chosen) choose(null);
    const end = 2 * answer.rounds.length;
    goTo(step === null || step >= end ? 0 : step);
    play.replaceChildren("❚❚ Pause");
    timer = setInterval(() => goTo(Math.min(step + 1, end)), 1000 * PLAY_SECONDS);
  };

  // Keys: while it is played, rounds are steps of the play, else the choice of a slot.
  const steer = (key) => {
    if (key === " ") toggle();
    else if (key === "Escape") {
      if (timer) stop();
      else if (chosen) choose(null);
      else goTo(null);
    } else if (step !== null && !chosen) {
      stop();
      goTo(nextStep(answer, step, key));
    } else if (answer.tokens.length) {
      goTo(null);
      choose(nextSlot(answer, chosen, key));
    }
  };

  root.addEventListener("keydown", (event) => {
    const keys = [" ", "Escape", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
    if (!keys.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    // A button and a box are pressed with space themselves.
    if (event.target !== text && event.key === " ") return;
    event.preventDefault();
    steer(event.key);
  });
  const tokenAt = (event) => {
    const span = event.target.closest?.(".dspark-word");
    return span ? answer.tokens[Number(span.dataset.i)] : null;
  };
  text.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    stop();
    hint.hide();
    choose(isChosen(token) ? null : [token.round, token.slot]);
    text.focus({ preventScroll: true });
  });
  text.addEventListener("pointermove", (event) => {
    const token = tokenAt(event);
    if (!token) {
      hint.hide();
      return;
    }
    const box = root.getBoundingClientRect();
    hint.show(event.clientX - box.left, event.clientY - box.top, tokenFacts(token));
  });
  text.addEventListener("pointerleave", hint.hide);
  const roundAt = (event) => {
    const x = event.clientX - canvas.canvas.getBoundingClientRect().left - 2;
    return answer.rounds[Math.floor(x / column)];
  };
  canvas.canvas.addEventListener("click", (event) => {
    const round = roundAt(event);
    if (!round) return;
    goTo(null);
    choose([round.number, round.accepted]);
    text.focus({ preventScroll: true });
  });
  canvas.canvas.addEventListener("pointermove", (event) => {
    const round = roundAt(event);
    const box = root.getBoundingClientRect();
    if (round) hint.show(event.clientX - box.left, event.clientY - box.top, [roundFacts(round)]);
    else hint.hide();
  });
  canvas.canvas.addEventListener("pointerleave", hint.hide);

  const show = () => {
    const before = answer;
    state = model.get("state") ?? {};
    answer = readAnswer(state);
    const count = answer.tokens.filter((token) => token.said).length;
    root.hidden = !answer.tokens.length;
    words.textContent = state.words ?? "";
    asked.textContent = state.asked ? `❯ ${state.asked}` : "";
    asked.hidden = !state.asked;
    text.setAttribute("aria-label",
      `answer of ${count} tokens in ${answer.rounds.length} rounds. Arrow keys choose a slot, ` +
      "up and down a round, space plays the rounds, Escape closes.");
    const lengths = answer.rounds.map((round) => round.accepted).join(", ");
    canvas.canvas.setAttribute("aria-label", `accepted tokens of each round: ${lengths || "none"}`);
    column = Math.max(8, Math.min(22, Math.floor(900 / Math.max(answer.rounds.length, 1))));
    stripBox.style.width = `${answer.rounds.length * column + 6}px`;
    for (const one of [play, back, on]) one.disabled = !answer.rounds.length;
    const counts = {};
    for (const token of answer.tokens) counts[token.outcome] = (counts[token.outcome] ?? 0) + 1;
    fillLegend(counts);
    // Another answer begins anew; one that has grown keeps what is chosen.
    const grown = before.rounds.length <= answer.rounds.length &&
      before.tokens.every((token, i) => answer.tokens[i]?.text === token.text);
    if (!grown) {
      goTo(null);
      if (chosen) choose(null);
    } else if (!before.tokens.length) chosen = slotHeld(answer, model.get("selection"));
    all.disabled = step === null;
    layOut();
    if (state.running && !chosen) text.scrollTop = text.scrollHeight;
    el.dataset.frame = state.frame ?? 0;
  };
  const fillLegend = (counts) => {
    legend.replaceChildren(...OUTCOMES.filter((name) => counts[name]).map((name) => {
      const how = SAID.has(name) ? "said" : "vain";
      const sign = how === "vain" ? { border: `1px dashed ${colours.faint}` } : {};
      const entry = node("li", {
        class: `dspark-word ${how === "said" ? name : ""}`, title: OUTCOME_WORDS[name],
        style: { ...look(name, how), ...sign, cursor: "help" },
      }, `${name === "rejected" ? "✗ " : ""}${name} ${counts[name].toLocaleString("en")}`);
      return entry;
    }));
  };
  const select = () => {
    const next = slotHeld(answer, model.get("selection"));
    if (String(next) !== String(chosen)) choose(next, true);
  };
  const recolour = () => {
    colour();
    show();
  };
  let width = 0;
  const resized = new ResizeObserver(() => {
    if (text.clientWidth !== width) {
      width = text.clientWidth;
      putCard();
    }
  });
  const stopTheme = onTheme(el, recolour);
  recolour();
  resized.observe(text);
  model.on("change:state", show);
  model.on("change:selection", select);
  return () => {
    stop();
    stopTheme();
    hint.stop();
    canvas.stop();
    resized.disconnect();
    model.off("change:state", show);
    model.off("change:selection", select);
  };
}
