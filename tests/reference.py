"""What the tests believe of the model: training forward and objective, one block at a time.

The method of DSpark (arXiv 2607.05147) in float64, in loops over rows, blocks, layers, heads, slots
and keys: every tensor here is one vector, or one matrix that multiplies one vector. A block is
computed from its anchor's document alone, cut out of the row and counted from its own first token,
so no mask, padding or packing can be wrong. Parameters come from a state dict with the published
names; gradients are autograd's, through the loops. Nothing of ``dspark_lab`` is used. Index b is a
row, n a block of it, k a slot of the block. The configuration may ask for the variants of drafters:
a given anchor (``sample_from_anchor``), windows and causal layers, YaRN, soft caps and a reduced
vocabulary, whose ids are ``draft_ids`` and whose teacher reads ``target_head``.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass
class Slot:
    """One slot; what needs a token beyond the document's end is None, and None if not asked for."""

    logits: Tensor | None = None
    confidence: Tensor | None = None
    teacher: Tensor | None = None
    label: int | None = None
    supervised: bool = False


def forward(
    state: State,
    config: Mapping,
    input_ids: Sequence[Sequence[int]],
    features: Tensor,
    loss_mask: Sequence[Sequence[bool]],
    last: Tensor | None,
    anchors: Sequence[Sequence[int]],
    keep: Sequence[Sequence[bool]],
    seq_lens: Sequence[Sequence[int]] | None = None,
) -> list[list[list[Slot] | None]]:
    """Every slot, [batch][anchor][slot]; a dummy block is None.

    ``features`` and ``last`` are [batch, seq, size]: the target's context features and its final
    hidden states. ``seq_lens`` are the lengths of each row's documents; None: a row is one.
    """
    out: list[list[list[Slot] | None]] = []
    for b, row in enumerate(anchors):
        lengths = [len(input_ids[b])] if seq_lens is None else seq_lens[b]
        blocks: list[list[Slot] | None] = []
        for anchor, kept in zip(row, keep[b], strict=True):
            first, past = document_of(anchor, lengths)
            given = (input_ids[b], features[b], loss_mask[b], None if last is None else last[b])
            document = [None if x is None else x[first:past] for x in given]
            blocks.append(block(state, config, *document, anchor - first) if kept else None)
        out.append(blocks)
    return out


def document_of(position: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Where the document that holds this position of the row begins, and where it is over."""
    first = 0
    for length in lengths:
        if position < first + length:
            return first, first + length
        first += length
    raise ValueError(f"position {position} is in no document")


def block(
    state: State,
    config: Mapping,
    tokens: Sequence[int],
    features: Tensor,
    supervised: Sequence[bool],
    last: Tensor | None,
    anchor: int,
) -> list[Slot]:
    """The slots of the block at ``anchor``; everything given is one document."""
    given = 0 if config.get("sample_from_anchor", True) else 1
    predicting = range(config["block_size"] - given)
    known = [k for k in predicting if anchor + k < len(tokens)]
    hidden = backbone(state, config, tokens[anchor], features[:anchor])[given:]
    previous = [tokens[anchor + k] for k in known]
    bias = markov_bias(state, config, previous, hidden)

    slots = [Slot() for _ in predicting]
    unbroken = True
    for k in known:
        slot = slots[k]
        slot.logits = capped(linear(state, "lm_head", hidden[k]), config, "final_logit_softcapping")
        if bias is not None:
            slot.logits = slot.logits + bias[k]
        slot.logits = (config.get("logit_scale") or 1.0) * slot.logits
        if config.get("draft_ids") is not None:
            own = dict(zip(config["draft_ids"], slot.logits, strict=True))
            never = torch.tensor(-math.inf, dtype=torch.float64)
            slot.logits = torch.stack([own.get(v, never) for v in range(config["vocab_size"])])
        if config["enable_confidence_head"]:
            read = hidden[k]
            if config["confidence_head_with_markov"]:
                embedded = state["markov_head.markov_w1.weight"][previous[k]]
                read = torch.cat([hidden[k], embedded])
            slot.confidence = linear(state, "confidence_head.proj", read)[0]
        if last is not None:
            head = "target_head" if config.get("draft_ids") is not None else "lm_head"
            product = capped(linear(state, head, last[anchor + k]), config, "target_cap")
            slot.teacher = config.get("target_scale", 1.0) * product
        label = anchor + k + 1
        if label < len(tokens):
            slot.label = tokens[label]
        unbroken = unbroken and label < len(tokens) and supervised[label]
        slot.supervised = unbroken
    return slots


def capped(product: Tensor, config: Mapping, name: str) -> Tensor:
    cap = config.get(name)
    return product if cap is None else cap * torch.tanh(product / cap)


def backbone(state: State, config: Mapping, anchor_token: int, before: Tensor) -> list[Tensor]:
    """The final hidden vector of each slot; ``before`` are the features before the anchor."""
    eps = config["rms_norm_eps"]
    anchor = len(before)
    context = [rms_norm(state, "hidden_norm", linear(state, "fc", f), eps) for f in before]
    slots = range(config["block_size"])
    inputs = [anchor_token if k == 0 else config["mask_token_id"] for k in slots]
    x = [state["embed_tokens.weight"][token] for token in inputs]
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        h = [rms_norm(state, f"{layer}.input_layernorm", v, eps) for v in x]
        attended = attention(state, config, i, context, h, anchor)
        x = [v + a for v, a in zip(x, attended, strict=True)]
        h = [rms_norm(state, f"{layer}.post_attention_layernorm", v, eps) for v in x]
        x = [v + mlp(state, f"{layer}.mlp", u) for v, u in zip(x, h, strict=True)]
    return [rms_norm(state, "norm", v, eps) for v in x]


def attention(
    state: State,
    config: Mapping,
    layer: int,
    context: Sequence[Tensor],
    slots: Sequence[Tensor],
    anchor: int,
) -> list[Tensor]:
    """Each slot looks at all of the context before its anchor and at all slots of its block.

    Under a window, at the context less than so many positions back; a causal layer's slot at no
    later slot. Unless told otherwise, layers with a window are causal.
    """
    name = f"layers.{layer}.self_attn"
    size, eps = config["head_dim"], config["rms_norm_eps"]
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    slides = kinds[layer] == "sliding_attention"
    causal = slides if config.get("is_causal") is None else config["is_causal"]

    def sees(k: int, place: int) -> bool:
        if place < anchor:
            return not slides or anchor + k - place < config["sliding_window"]
        return not causal or place - anchor <= k

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def project(kind: str, vector: Tensor, head: int) -> Tensor:
        return linear(state, f"{name}.{kind}_proj", vector)[head * size : (head + 1) * size]

    def placed(kind: str, vector: Tensor, head: int, position: int) -> Tensor:
        normed = rms_norm(state, f"{name}.{kind}_norm", project(kind, vector, head), eps)
        turn, factor = rotation(position, size, config["rope_theta"], config.get("yarn"))
        return factor * turn @ normed

    seen = list(enumerate(context)) + [(anchor + k, vector) for k, vector in enumerate(slots)]
    keys, values = [], []
    for head in range(kv_heads):
        keys.append([placed("k", vector, head, position) for position, vector in seen])
        values.append([project("v", vector, head) for _, vector in seen])

    out = []
    for k, slot in enumerate(slots):
        outputs = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            query = placed("q", slot, head, anchor + k)
            places = [i for i, (position, _) in enumerate(seen) if sees(k, position)]
            scores = [query @ keys[shared][i] / math.sqrt(size) for i in places]
            weights = torch.softmax(torch.stack(scores), 0)
            looked = [values[shared][i] for i in places]
            outputs.append(sum(w * v for w, v in zip(weights, looked, strict=True)))
        out.append(linear(state, f"{name}.o_proj", torch.cat(outputs)))
    return out


@cache
def rotation(position: int, size: int, theta: float, yarn=None) -> tuple[Tensor, float]:
    """RoPE's matrix: coordinates i and i + size / 2 turn by position / theta^(2i / size).

    YaRN slows slow pairs down, by its factor those that turn less than ``beta_slow`` times over the
    original length, and multiplies queries and keys by a factor.
    """
    matrix = torch.zeros(size, size, dtype=torch.float64)
    half, factor = size // 2, 1.0

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    for i in range(half):
        angle = position / theta ** (2 * i / size)
        if yarn is not None:
            low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
            high = min(math.ceil(pair_that_turns(yarn.beta_slow)), size - 1)
            slowed = min(max((i - low) / (high - low), 0), 1)
            angle = angle * (1 - slowed) + angle / yarn.factor * slowed
            factor = 0.1 * math.log(yarn.factor) + 1
        matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
        matrix[i, i + half] = -math.sin(angle)
        matrix[i + half, i] = math.sin(angle)
    return matrix, factor


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    """SwiGLU: the gate's SiLU times the other half, projected back."""
    gate = linear(state, f"{name}.gate_proj", x)
    return linear(
        state, f"{name}.down_proj", gate * torch.sigmoid(gate) * linear(state, f"{name}.up_proj", x)
    )


def markov_bias(
    state: State, config: Mapping, previous: Sequence[int], hidden: Sequence[Tensor]
) -> list[Tensor] | None:
    """What the token before each slot adds to its logits."""
    kind, name = config["markov_head_type"], "markov_head"
    if kind == "none" or config["markov_rank"] == 0:
        return None
    out = []
    rank = config["markov_rank"]
    memory = torch.zeros(rank, dtype=torch.float64)
    for token, h in zip(previous, hidden, strict=False):
        e = state[f"{name}.markov_w1.weight"][token]
        if kind == "vanilla":
            latent = e
        elif kind == "gated":
            latent = torch.sigmoid(linear(state, f"{name}.gate_proj", torch.cat([h, e]))) * e
        else:
            z = linear(state, f"{name}.joint_proj", torch.cat([memory, e, h]))
            gate = torch.sigmoid(z[:rank])
            memory = gate * memory + (1 - gate) * torch.tanh(z[rank : 2 * rank])
            latent = torch.tanh(z[2 * rank :])
        out.append(linear(state, f"{name}.markov_w2", latent))
    return out


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """weight @ x, and the bias where the state has one."""
    y = state[f"{name}.weight"] @ x
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean of squares + eps)."""
    return state[f"{name}.weight"] * x / torch.sqrt((x * x).sum() / len(x) + eps)


def accept_rate(slot: Slot) -> Tensor:
    """The probability mass that draft and target share: the sum over tokens of the smaller one."""
    return torch.minimum(torch.softmax(slot.logits, 0), torch.softmax(slot.teacher, 0)).sum()


@dataclass
class Objective:
    """The loss, the figures, and the sums by slot of a block; NaN without a teacher or a head."""

    loss: Tensor
    figures: dict[str, Tensor]
    sums: dict[str, Tensor]
    blocks: int


def objective(
    rows: list[list[list[Slot] | None]],
    block_size: int,
    ce_weight: float = 0.1,
    l1_weight: float = 0.9,
    confidence_weight: float = 1.0,
    loss_decay_gamma: float = 4.0,
) -> Objective:
    """The three terms over supervised slots, weighted exp(-k / gamma); needs at least one slot."""
    zero, unknown = (torch.tensor(x, dtype=torch.float64) for x in (0.0, math.nan))
    of_slots: dict[str, list[Tensor]] = defaultdict(lambda: [zero] * block_size)
    blocks = [block for row in rows for block in row if block is not None]
    for block in blocks:
        survives = believed = 1.0
        for k, slot in enumerate(block):
            if not slot.supervised:
                break
            weight = math.exp(-k / loss_decay_gamma)
            draft = torch.softmax(slot.logits, 0)
            distance = rate = belief = unknown
            if slot.teacher is not None:
                distance = (draft - torch.softmax(slot.teacher, 0)).abs().sum()
                rate = accept_rate(slot).detach()
                if slot.confidence is not None:
                    belief = torch.sigmoid(slot.confidence)
            bce = -rate * torch.log(belief) - (1 - rate) * torch.log(1 - belief)
            survives, believed = survives * rate, believed * belief
            ce = -weight * torch.log(draft[slot.label]) if draft[slot.label] > 0 else zero
            terms = {"count": 1, "weight": weight, "ce": ce}
            terms |= {"l1": weight * distance, "confidence": weight * bce, "accept": rate}
            terms |= {"confidence_error": abs(belief - rate), "confidence_bias": belief - rate}
            terms |= {"survival": survives, "cumulative_bias": believed - survives}
            for name, value in terms.items():
                of_slots[name][k] = of_slots[name][k] + value

    sums = {name: torch.stack(values) for name, values in of_slots.items()}
    total = {name: values.sum() for name, values in sums.items()}
    supervised = sum(block[0].supervised for block in blocks)
    figures = {name: total[name] / total["weight"] for name in ("ce", "l1", "confidence")}
    figures |= {"tau": 1 + total["survival"] / supervised}
    figures |= {"accept_rate": total["accept"] / total["count"]}
    for name in ("confidence_error", "confidence_bias"):
        figures[name] = total[name] / total["count"]
    weights = {"ce": ce_weight, "l1": l1_weight, "confidence": confidence_weight}
    known = [weights[name] * figures[name] for name in weights if not figures[name].isnan()]
    return Objective(sum(known), figures, sums, supervised)
