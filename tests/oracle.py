"""What the tests believe: the specification in plain Python loops.

Every function takes lists and returns lists. There is no tensor, no broadcasting and no
cleverness here; a reader checks each function against its sentence. Index b is a row of the
batch, p or j a position in it, n an anchor or its block, k a slot of a block.
"""

from itertools import combinations


def supervised(loss_mask):
    """A token is supervised where its loss mask is greater than one half."""
    return [[value > 0.5 for value in row] for row in loss_mask]


def candidate_mask(loss_mask, doc_remaining=None):
    """p is a candidate where p and p + 1 are both supervised, and p + 1 is p's document's."""
    out = []
    for b, row in enumerate(supervised(loss_mask)):
        ends = [doc_remaining is not None and doc_remaining[b][p] < 1 for p in range(len(row))]
        out.append([row[p] and row[p + 1] and not ends[p] for p in range(len(row) - 1)])
    return out


def sampled_anchors(draw, candidates, num_anchors):
    """The candidates with the smallest draws, ties to the lower position, then ascending."""
    anchors, keep = [], []
    for row_draw, row_candidates in zip(draw, candidates, strict=True):
        positions = [p for p, flag in enumerate(row_candidates) if flag]
        by_draw = sorted(positions, key=lambda p: (row_draw[p], p))
        kept = sorted(by_draw[:num_anchors])
        dummies = num_anchors - len(kept)
        anchors.append(kept + [0] * dummies)
        keep.append([True] * len(kept) + [False] * dummies)
    return anchors, keep


def labels(anchors, block_size):
    """Slot k of the block at anchor a predicts token a + k + 1."""
    return [[[a + k + 1 for k in range(block_size)] for a in row] for row in anchors]


def safe_labels(anchors, keep, block_size, seq_len):
    """The labels clamped into the row; 0 for dummy anchors."""
    out = []
    for row, row_keep in zip(labels(anchors, block_size), keep, strict=True):
        blocks = []
        for block, kept in zip(row, row_keep, strict=True):
            blocks.append([max(min(label, seq_len - 1), 0) if kept else 0 for label in block])
        out.append(blocks)
    return out


def eval_mask(seq_len, loss_mask, anchors, keep, block_size, doc_remaining=None):
    """Walk each kept block from its anchor; stop at the first token that is not supervised.

    The end of the row stops a block, and so does the end of the anchor's document.
    """
    tokens = supervised(loss_mask)
    out = []
    for b, row in enumerate(anchors):
        blocks = []
        for n, anchor in enumerate(row):
            block = [False] * block_size
            for k in range(block_size):
                label = anchor + k + 1
                if not keep[b][n] or label >= seq_len or not tokens[b][label]:
                    break
                if doc_remaining is not None and k + 1 > doc_remaining[b][anchor]:
                    break
                block[k] = True
            blocks.append(block)
        out.append(blocks)
    return out


def position_ids(anchors, block_size, context_positions=None):
    """Block after block: the anchor's position, and one more for each slot."""
    out = []
    for b, row in enumerate(anchors):
        ids = []
        for anchor in row:
            base = anchor if context_positions is None else context_positions[b][anchor]
            ids.extend(base + k for k in range(block_size))
        out.append(ids)
    return out


def noise_ids(input_ids, anchors, keep, mask_token_id, block_size):
    """The mask token everywhere, except the anchor's own token in slot 0 of kept blocks."""
    out = []
    for b, row in enumerate(anchors):
        ids = []
        for n, anchor in enumerate(row):
            for k in range(block_size):
                ids.append(input_ids[b][anchor] if k == 0 and keep[b][n] else mask_token_id)
        out.append(ids)
    return out


def doc_ids(seq_lens, seq_len):
    """How many document ends lie at or before each position."""
    out = []
    for row in seq_lens:
        ends = [sum(row[: i + 1]) for i in range(len(row))]
        out.append([sum(end <= p for end in ends) for p in range(seq_len)])
    return out


def packed_rows(seq_lens, seq_len):
    """(tokens left in the document after each one, position in the document); 0 in the tail."""
    remaining, positions = [], []
    for row in seq_lens:
        row_remaining, row_positions = [], []
        for length in row:
            row_remaining.extend(range(length - 1, -1, -1))
            row_positions.extend(range(length))
        tail = seq_len - len(row_remaining)
        remaining.append(row_remaining + [0] * tail)
        positions.append(row_positions + [0] * tail)
    return remaining, positions


def visible(query, key, anchors, keep, seq_len, block_size, docs=None):
    """May this query see this key, in one row of the batch?

    A context position: iff the block is kept, the position is before its anchor, and both are
    of one document. A block slot: iff it is of the query's own block.
    """
    block = query // block_size
    if key >= seq_len:
        return (key - seq_len) // block_size == block
    if not keep[block]:
        return False
    if docs is not None and docs[key] != docs[anchors[block]]:
        return False
    return key < anchors[block]


def dense_mask(anchors, keep, seq_len, block_size, docs=None):
    """The training mask, [batch][query][key]."""
    out = []
    for b, row in enumerate(anchors):
        queries = range(len(row) * block_size)
        keys = range(seq_len + len(queries))
        rule = row, keep[b], seq_len, block_size, None if docs is None else docs[b]
        out.append([[visible(query, key, *rule) for key in keys] for query in queries])
    return out


def tile_kinds(mask, tile_size):
    """[query tile][key tile]: "empty", "partial" or "full", for one row's [query][key] mask.

    A tile is full where all tile_size x tile_size pairs exist and are visible; a tile that
    hangs over the edge of the mask is never full.
    """
    queries, keys = len(mask), len(mask[0])
    out = []
    for top in range(0, queries, tile_size):
        kinds = []
        for left in range(0, keys, tile_size):
            count = sum(sum(row[left : left + tile_size]) for row in mask[top : top + tile_size])
            full = count == tile_size * tile_size
            kinds.append("full" if full else "partial" if count else "empty")
        out.append(kinds)
    return out


def tile_lists(kinds, kind):
    """For each row of tiles, the columns of this kind, ascending."""
    return [[j for j, value in enumerate(row) if value == kind] for row in kinds]


def times_supervised(seq_len, anchors, slots):
    """How many supervised slots have each position as their label; slots is an eval mask."""
    out = []
    for row, row_slots in zip(anchors, slots, strict=True):
        times = [0] * seq_len
        for anchor, block in zip(row, row_slots, strict=True):
            for k, flag in enumerate(block):
                if flag:
                    times[anchor + k + 1] += 1
        out.append(times)
    return out


def all_draws(loss_mask, num_anchors, block_size, doc_remaining=None):
    """For each row, what every possible draw supervises: [batch][draw][position] times.

    A draw is a set of num_anchors candidates, or of all where there are fewer; all sets are
    equally likely.
    """
    out = []
    for b, row in enumerate(candidate_mask(loss_mask, doc_remaining)):
        candidates = [p for p, flag in enumerate(row) if flag]
        mask = [loss_mask[b]]
        remaining = None if doc_remaining is None else [doc_remaining[b]]
        draws = []
        for anchors in combinations(candidates, min(num_anchors, len(candidates))):
            keep = [[True] * len(anchors)]
            slots = eval_mask(len(mask[0]), mask, [anchors], keep, block_size, remaining)
            draws += times_supervised(len(mask[0]), [anchors], slots)
        out.append(draws)
    return out


def reaching_anchors(loss_mask, block_size, doc_remaining=None):
    """From how many candidates a block supervises each token: times with all of them drawn."""
    everything = len(loss_mask[0])
    return [draws[0] for draws in all_draws(loss_mask, everything, block_size, doc_remaining)]


def token_states(loss_mask, attention_mask, times, reach):
    """What each token is, from how often this draw, and any draw at all, supervises it."""
    out = []
    for b, row in enumerate(supervised(loss_mask)):
        states = []
        for p, flag in enumerate(row):
            if not attention_mask[b][p]:
                states.append("padding")
            elif not flag:
                states.append("prompt")
            elif times[b][p] > 0:
                states.append("covered")
            elif reach[b][p] == 0:
                states.append("never a label")
            else:
                states.append("not covered")
        out.append(states)
    return out


def regions(anchors, keep, seq_len, block_size, docs=None):
    """The name of each pair's region, [batch][query][key]."""
    out = []
    for b, mask in enumerate(dense_mask(anchors, keep, seq_len, block_size, docs)):
        rows = []
        for query, row in enumerate(mask):
            own = "own block" if keep[b][query // block_size] else "dummy block"
            names = ["context prefix"] * seq_len + [own] * (len(row) - seq_len)
            rows.append([n if seen else "hidden" for n, seen in zip(names, row, strict=True)])
        out.append(rows)
    return out
