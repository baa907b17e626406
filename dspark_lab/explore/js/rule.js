// The training mask's rule, and what follows from it: why a pair is hidden, tiles, differences.
//
// The queries are the slots of all blocks of a row, block after block. The keys are the row's own
// tokens, the context, followed by the same slots. A slot of block b sees exactly
//
//     context prefix: the context tokens of the anchor's document before the anchor itself, and
//     own block:      all slots of block b, earlier and later ones.
//
// A dummy block has an empty prefix and sees only itself. Under a window, slot k of the block at
// anchor a sees of its prefix only the tokens j with a + k - j < window; a causal slot sees of its
// block no later slot. Two faults that masks have can be had, too: a context that reaches past the
// anchor (`reach` 1), dummy blocks that do not see themselves (`dummies` false). And a mask may be
// given by its runs: then it sees what these say, and the rule says what would be right.
//
// Pure functions without a page. Intervals are [start, end), of keys or queries counted from 0.
//
//   readState(state, row)                 all that Python sent, as the functions below take it
//   contextOf, ownOf(mask, query)         the rule: [start, end) of the keys that a query sees
//   seenBy(mask, query)                   the same in one ascending list, of a given mask its runs
//   sees, kindOf, why(mask, query, key)   whether, as an index into PAIR_KINDS, and in words
//   regionOf(mask, query, key), countRegions(mask)            by REGION_NAMES
//   rectangles(mask, first, past)         visible pairs as [query, past, key, past, region] ...
//   tileRow(mask, size, row)              touched tiles as [column, past, state] ...
//   tileState(mask, size, row, column), countTiles(mask, size)     by TILE_NAMES
//   differenceOf(mask, other, query)      keys that only one sees as [start, end, side] ...
//   differenceRectangles(mask, other)     the same as [query, past, key, past, side] ...
//   countDifferences(mask, found), nextDifference(found, query, key, backwards)   of these
//   cellFacts(state, query, key), factLines(facts, show)      all that there is to say of a pair

const REGION_NAMES = ["hidden", "context prefix", "own block", "dummy block"];
const TILE_NAMES = ["empty", "partial", "full"];
// What a pair is to the rule; the first three are visible.
const PAIR_KINDS = [
  "context prefix", "own block", "dummy block", "the anchor itself", "after the anchor",
  "another document", "padding", "beyond the window", "a later slot", "another block",
  "a dummy's context", "a dummy's own block",
];
const [PREFIX, OWN, DUMMY, ANCHOR, AFTER, DOCUMENT, PADDING, BEYOND, LATER, BLOCK, CONTEXTLESS,
  UNSEEN] = PAIR_KINDS.keys();

// The rule.

function contextOf(mask, query) {
  const block = blockOf(mask, query);
  if (!mask.keep[block]) return [0, 0];
  const anchor = mask.anchors[block];
  const start = mask.start[block];
  const end = anchor + mask.reach;
  if (!mask.window) return [start, end];
  return [Math.max(start, anchor + slotOf(mask, query) + 1 - mask.window), end];
}

function ownOf(mask, query) {
  const block = blockOf(mask, query);
  const start = mask.seq_len + block * mask.block_size;
  if (!mask.keep[block] && !mask.dummies) return [start, start];
  return [start, mask.causal ? mask.seq_len + query + 1 : start + mask.block_size];
}

function blockOf(mask, query) {
  return Math.floor(query / mask.block_size);
}

function slotOf(mask, query) {
  return query % mask.block_size;
}

// What a query sees, as ascending intervals that do not touch: start, end, start, end ...
function seenBy(mask, query) {
  if (mask.runs) {
    return mask.runs.subarray(2 * mask.offsets[query], 2 * mask.offsets[query + 1]);
  }
  const [start, end] = contextOf(mask, query);
  const [first, past] = ownOf(mask, query);
  if (start >= end) return first < past ? [first, past] : [];
  if (first >= past) return [start, end];
  return end === first ? [start, past] : [start, end, first, past];
}

function sees(mask, query, key) {
  const seen = seenBy(mask, query);
  // Below: how many starts and ends lie at or before the key; within a run that is odd.
  let low = 0;
  let high = seen.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (seen[middle] <= key) low = middle + 1;
    else high = middle;
  }
  return low % 2 === 1;
}

// Why.

function kindOf(mask, query, key) {
  const block = blockOf(mask, query);
  const kept = mask.keep[block];
  if (key >= mask.seq_len) {
    const [first, past] = ownOf(mask, query);
    if (key >= first && key < past) return kept ? OWN : DUMMY;
    if (blockOf(mask, key - mask.seq_len) !== block) return BLOCK;
    return kept || mask.dummies ? LATER : UNSEEN;
  }
  if (!kept) return CONTEXTLESS;
  const [start, end] = contextOf(mask, query);
  if (key >= start && key < end) return PREFIX;
  if (key >= mask.length) return PADDING;
  const anchor = mask.anchors[block];
  if (documentOf(mask, key) !== documentOf(mask, anchor)) return DOCUMENT;
  if (key < anchor) return BEYOND;
  return key === anchor ? ANCHOR : AFTER;
}

function why(mask, query, key) {
  const seen = sees(mask, query, key);
  const kind = kindOf(mask, query, key);
  const reason = reasonOf(mask, kind, query, key);
  if (seen === kind <= DUMMY) return `${seen ? "visible" : "hidden"}: ${reason}`;
  return `${seen ? "visible" : "hidden"}, against the rule: ${reason}`;
}

function reasonOf(mask, kind, query, key) {
  const anchor = mask.anchors[blockOf(mask, query)];
  const slot = slotOf(mask, query);
  const other = slotOf(mask, key - mask.seq_len);
  const window = `the window of ${mask.window}`;
  const reached = `${anchor + slot - key} before position ${anchor + slot}`;
  switch (kind) {
    case PREFIX:
      if (key >= anchor) return `token ${key} is the anchor, which this context includes`;
      return `token ${key} is before the anchor ${anchor}`
        + (mask.documents.length > 1 ? " in the same document" : "")
        + (mask.window ? `, within ${window}` : "");
    case OWN: return `slot ${other} is of the same block`;
    case DUMMY: return "a dummy block sees itself";
    case ANCHOR: return `token ${key} is the anchor itself, which enters through slot 0`;
    case AFTER: return `token ${key} is not before the anchor ${anchor}`;
    case DOCUMENT: return "another document";
    case PADDING: return "padding";
    case BEYOND: return `token ${key} is ${reached}, outside ${window}`;
    case LATER: return `slot ${other} is later than slot ${slot}, and the block is causal`;
    case BLOCK: return "another block";
    case CONTEXTLESS: return "a dummy block sees no context";
    default: return "here a dummy block does not see itself";
  }
}

function documentOf(mask, token) {
  return lastAtMost(mask.documents, token);
}

// The index of the last value that is at most `wanted`, in an ascending list; -1 if there is none.
function lastAtMost(values, wanted) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

// Regions.

function regionOf(mask, query, key) {
  if (!sees(mask, query, key)) return 0;
  if (key < mask.seq_len) return 1;
  return mask.keep[blockOf(mask, query)] ? 2 : 3;
}

function countRegions(mask) {
  const counts = [0, 0, 0, 0];
  for (let query = 0; query < mask.queries; ) {
    const past = pastAlike(mask, query, mask.queries);
    const seen = seenBy(mask, query);
    for (let i = 0; i < seen.length; i += 2) {
      const inContext = Math.max(0, Math.min(seen[i + 1], mask.seq_len) - seen[i]);
      counts[1] += inContext * (past - query);
      counts[mask.keep[blockOf(mask, query)] ? 2 : 3] +=
        (seen[i + 1] - seen[i] - inContext) * (past - query);
    }
    query = past;
  }
  counts[0] = mask.queries * mask.keys - counts[1] - counts[2] - counts[3];
  return counts;
}

// Behind the last query, before `limit`, of which it is known that it sees what `query` sees.
function pastAlike(mask, query, limit) {
  if (mask.runs || mask.window || mask.causal) return query + 1;
  return Math.min(limit, (blockOf(mask, query) + 1) * mask.block_size);
}

function rectangles(mask, first = 0, past = mask.queries) {
  return joined(first, past, (query) => {
    const seen = seenBy(mask, query);
    const parts = [];
    for (let i = 0; i < seen.length; i += 2) {
      // The seam between context and slots cuts a run in two regions.
      const seam = Math.min(Math.max(mask.seq_len, seen[i]), seen[i + 1]);
      if (seen[i] < seam) parts.push(seen[i], seam, 1);
      if (seam < seen[i + 1]) {
        parts.push(seam, seen[i + 1], mask.keep[blockOf(mask, query)] ? 2 : 3);
      }
    }
    return [parts, pastAlike(mask, query, past)];
  });
}

// Intervals of keys, given query by query as [start, end, value ...] with the query behind those of
// which the same is known, as [query, past query, key, past key, value] ...
function joined(first, past, intervalsAt) {
  const found = [];
  let before = [];
  for (let query = first; query < past; ) {
    const [parts, next] = intervalsAt(query);
    const same = parts.length === before.length && parts.every((part, i) => part === before[i]);
    if (same) {
      for (let i = 0; i < parts.length / 3; i++) found[found.length - 4 - 5 * i] = next;
    } else {
      for (let i = 0; i < parts.length; i += 3) {
        found.push(query, next, parts[i], parts[i + 1], parts[i + 2]);
      }
    }
    before = parts;
    query = next;
  }
  return Int32Array.from(found);
}

// Tiles, as FlexAttention has them: full where all pairs exist and are visible, so that a tile that
// hangs over an edge of the mask is not.

function tileRow(mask, size, row) {
  const first = row * size;
  const past = Math.min(first + size, mask.queries);
  // Where, along the columns, queries begin or cease to touch tiles, and to cover them.
  const edges = [];
  for (let query = first; query < past; ) {
    const next = pastAlike(mask, query, past);
    const seen = seenBy(mask, query);
    for (let i = 0; i < seen.length; i += 2) {
      edges.push([Math.floor(seen[i] / size), 1, 0], [Math.ceil(seen[i + 1] / size), -1, 0]);
      const begin = Math.ceil(seen[i] / size);
      const stop = Math.floor(seen[i + 1] / size);
      if (begin < stop) edges.push([begin, 0, next - query], [stop, 0, query - next]);
    }
    query = next;
  }
  edges.sort((left, right) => left[0] - right[0]);
  const found = [];
  let touching = 0;
  let covering = 0;
  edges.forEach(([column, touches, covers], i) => {
    touching += touches;
    covering += covers;
    const next = i + 1 < edges.length ? edges[i + 1][0] : column;
    if (!touching || next === column) return;
    const state = covering === size ? 2 : 1;
    const last = found.length - 3;
    if (last >= 0 && found[last + 1] === column && found[last + 2] === state) {
      found[last + 1] = next;
    } else found.push(column, next, state);
  });
  return found;
}

function tileState(mask, size, row, column) {
  const runs = tileRow(mask, size, row);
  for (let i = 0; i < runs.length; i += 3) {
    if (column >= runs[i] && column < runs[i + 1]) return runs[i + 2];
  }
  return 0;
}

function countTiles(mask, size) {
  const rows = Math.ceil(mask.queries / size);
  const counts = [rows * Math.ceil(mask.keys / size), 0, 0];
  for (let row = 0; row < rows; row++) {
    const runs = tileRow(mask, size, row);
    for (let i = 0; i < runs.length; i += 3) {
      counts[runs[i + 2]] += runs[i + 1] - runs[i];
      counts[0] -= runs[i + 1] - runs[i];
    }
  }
  return counts;
}

// Differences: side 0 is what only the mask sees, side 1 what only the other one sees.

function differenceOf(mask, other, query) {
  const mine = seenBy(mask, query);
  const theirs = seenBy(other, query);
  const found = [];
  let [i, j, from] = [0, 0, 0];
  while (i < mine.length || j < theirs.length) {
    const here = Math.min(mine[i] ?? Infinity, theirs[j] ?? Infinity);
    // Odd: inside a run.
    if (from < here && i % 2 !== j % 2) {
      const side = i % 2 ? 0 : 1;
      found.push(from, here, side);
    }
    if (mine[i] === here) i += 1;
    if (theirs[j] === here) j += 1;
    from = here;
  }
  return found;
}

function differenceRectangles(mask, other) {
  return joined(0, mask.queries, (query) => {
    const past = pastAlike(mask, query, mask.queries);
    return [differenceOf(mask, other, query), Math.min(past, pastAlike(other, query, past))];
  });
}

// How many pairs only one of two masks sees, by PAIR_KINDS of the first, and the first place.
function countDifferences(mask, found) {
  const kinds = [0, 1].map(() => PAIR_KINDS.map(() => 0));
  for (let i = 0; i < found.length; i += 5) {
    const [, past, key, pastKey, side] = found.subarray(i, i + 5);
    for (let query = found[i]; query < past; ) {
      const next = pastAlike(mask, query, past);
      for (const [start, end, kind] of kindsOf(mask, query, key, pastKey)) {
        kinds[side][kind] += (end - start) * (next - query);
      }
      query = next;
    }
  }
  const only = kinds.map((counts) => counts.reduce((sum, count) => sum + count, 0));
  return { only, kinds, first: nextDifference(found, -1, -1) };
}

// The kinds of an interval of keys: [start, end, kind] ...
function kindsOf(mask, query, key, past) {
  const anchor = mask.anchors[blockOf(mask, query)];
  const document = documentOf(mask, anchor);
  const block = mask.seq_len + blockOf(mask, query) * mask.block_size;
  const cuts = [
    mask.documents[document], mask.documents[document + 1] ?? mask.seq_len, anchor, anchor + 1,
    mask.length, mask.seq_len, block, block + mask.block_size,
    ...contextOf(mask, query), ...ownOf(mask, query),
  ].filter((cut) => cut > key && cut < past);
  const edges = [key, ...cuts.sort((left, right) => left - right), past];
  return edges.slice(1).map((end, i) => [edges[i], end, kindOf(mask, query, edges[i])]);
}

// The next corner of a rectangle behind a place, query by query, round and round; null if none is.
function nextDifference(found, query, key, backwards = false) {
  const count = found.length / 5;
  if (!count) return null;
  const before = (i) =>
    found[5 * i] < query || (found[5 * i] === query && found[5 * i + 2] < key + !backwards);
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (before(middle)) low = middle + 1;
    else high = middle;
  }
  const i = 5 * ((low - backwards + count) % count);
  return { query: found[i], key: found[i + 2], side: found[i + 4] };
}

// What Python sent.

function readState(state, row) {
  const { positions, supervised } = state.blocks;
  return {
    mask: readMask(state.mask),
    other: state.other ? readMask(state.other) : null,
    blocks: { positions: numbers(positions), supervised: numbers(supervised) },
    row: row ? { ...row, ids: numbers(row.ids), labels: numbers(row.labels) } : null,
    tileSize: state.tile_size,
  };
}

function rowOf(model) {
  const row = model.get("state").row ?? model.get("row");
  return row && row.texts ? row : null;
}

function readMask(given) {
  const mask = { ...given };
  for (const name of ["anchors", "keep", "documents"]) mask[name] = numbers(given[name]);
  mask.runs = given.runs ? numbers(given.runs) : null;
  mask.offsets = given.offsets ? numbers(given.offsets) : null;
  mask.blocks = mask.anchors.length;
  mask.queries = mask.blocks * mask.block_size;
  mask.keys = mask.seq_len + mask.queries;
  mask.start = mask.anchors.map((anchor) => mask.documents[documentOf(mask, anchor)]);
  return mask;
}

// Int32 numbers from their bytes, or from a list.
function numbers(data) {
  if (!(data instanceof DataView)) return Int32Array.from(data);
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
  return new Int32Array(bytes);
}

// What there is to say of a pair.

function cellFacts(state, query, key) {
  const { mask, other, row, tileSize } = state;
  const place = { row: Math.floor(query / tileSize), column: Math.floor(key / tileSize) };
  const tile = TILE_NAMES[tileState(mask, tileSize, place.row, place.column)];
  return {
    query: slotFacts(state, query),
    key: key < mask.seq_len
      ? { kind: "token", token: key, text: row ? row.texts[key] : "", document: documentOf(mask, key) }
      : { kind: "slot", ...slotFacts(state, key - mask.seq_len) },
    tile: { ...place, size: tileSize, state: tile },
    visible: sees(mask, query, key),
    region: REGION_NAMES[regionOf(mask, query, key)],
    why: why(mask, query, key),
    other: other && { name: other.name, visible: sees(other, query, key), why: why(other, query, key) },
  };
}

function slotFacts({ mask, blocks, row }, query) {
  const block = blockOf(mask, query);
  const slot = slotOf(mask, query);
  const kept = Boolean(mask.keep[block]);
  const anchor = mask.anchors[block];
  const given = mask.layout === "anchor_given" ? 1 : 0;
  const predicted = slot >= given;
  const label = predicted ? anchor + slot + 1 - given : -1;
  const supervised = predicted && slot < given + blocks.supervised[block];
  const readsAnchor = kept && slot === 0;
  return {
    block,
    slot,
    kept,
    anchor,
    input: readsAnchor ? (row ? row.texts[anchor] : `token ${anchor}`) : "[mask]",
    position: blocks.positions[block] + slot,
    document: documentOf(mask, anchor),
    label_position: label,
    label: row && kept && predicted && label < mask.seq_len ? row.texts[label] : "",
    supervised,
    reason: supervised ? "" : unsupervised(mask, blocks, row, block, slot, label),
  };
}

// Why a slot is not supervised: itself, or an earlier slot of its block.
function unsupervised(mask, blocks, row, block, slot, label) {
  if (label < 0) return "the anchor is given, slot 0 predicts nothing";
  if (!mask.keep[block]) return "a dummy block predicts nothing";
  if (label >= mask.seq_len) return "its label is past the end of the row";
  const anchor = mask.anchors[block];
  if (documentOf(mask, label) !== documentOf(mask, anchor)) {
    return "its label is past the end of the document";
  }
  const first = anchor + 1 + blocks.supervised[block];
  const known = row ? lastAtMost(row.labels, label) % 2 !== 0 : label === first;
  if (known) return `its label, token ${label}, is not supervised`;
  return `token ${first}, an earlier label of the block, is not supervised`;
}

// Facts as lines of text; `show` makes a token's text visible.
function factLines(facts, show = (text) => text) {
  const { query, key, tile, other } = facts;
  const quoted = (text) => (text ? ` “${show(text)}”` : "");
  const whose = (slot) => (slot.kept ? `anchor ${slot.anchor}` : "a dummy");
  const lines = [
    `query: block ${query.block} (${whose(query)}), slot ${query.slot}, reads`
      + `${quoted(query.input)}, position ${query.position}`,
  ];
  if (query.label_position >= 0 && query.kept) {
    lines.push(
      `predicts token ${query.label_position}${quoted(query.label)}: `
        + (query.supervised ? "supervised" : `not supervised, ${query.reason}`),
    );
  } else lines.push(`predicts nothing: ${query.reason}`);
  lines.push(
    key.kind === "token"
      ? `key: token ${key.token}${quoted(key.text)}, document ${key.document}`
      : `key: block ${key.block} (${whose(key)}), slot ${key.slot}, reads${quoted(key.input)}`,
    facts.why,
  );
  if (other) lines.push(`${other.name}: ${other.why}`);
  lines.push(`tile ${tile.row}, ${tile.column} of ${tile.size}: ${tile.state}`);
  return lines;
}
