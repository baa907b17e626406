"""The pocket target: a language model of a few million parameters, made in minutes.

SmolLM2's conversations become a byte-level BPE vocabulary of 2,048 and a Llama of four layers that
was trained on them from scratch. It speaks on the topics of the lab's prompts only, and it is small
enough that a drafter for it trains in minutes on two cores.

Everything follows from a seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from data.make.generate import Prompt, Record, Sampling, converse, make_batches, model_answer
from dspark_lab.chats import Chat, Encoded, collate
from dspark_lab.model import split_digits

# What a server at temperature 1 would draw, nothing cut off.
POCKET_SAMPLING = Sampling(temperature=1.0, top_k=2048, top_p=1.0, max_new_tokens=160)

START, END, PAD, MASK = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PocketConfig:
    """The target's shape and training; ``steps`` of ``rows`` x ``row_length`` tokens.

    The trained model's logits are divided by ``temperature``: sampled at 1 the target then talks as
    the trained model does at ``temperature``. So small a model spreads its probability far more
    widely than chat models of usual size do, and at 1 its answers would not read as text.
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    steps: int = 2000
    rows: int = 8
    row_length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    temperature: float = 0.5
    seed: int = 0


def train_tokenizer(chats: Iterable[Chat], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the conversations' text, digits apart, with a ChatML template.

    ``<|mask|>`` is the token that stands for "to be predicted" in a drafter's blocks; no text
    contains it.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split_digits()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for chat in chats for message in chat.messages)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_target(
    encoded: Sequence[Encoded], config: PocketConfig, *, progress: bool = True
) -> LlamaForCausalLM:
    """A Llama trained on every token of the conversations, in random order, epoch after epoch.

    The conversations stand one behind the other and are cut into rows. Where the CPU multiplies
    bfloat16 the matrix products are in it, the weights in fp32.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    rows = _rows(encoded, config)
    steps = tqdm(range(config.steps), desc="target", disable=not progress)
    model.train()
    for step in steps:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * (0.02 + 0.98 * decay)
        ids = next(rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            steps.set_postfix(loss=f"{loss.item():.3f}")
    return sharpen_(model.eval().requires_grad_(False), config.temperature)


@torch.no_grad()
def sharpen_(model: LlamaForCausalLM, temperature: float) -> LlamaForCausalLM:
    """Divide the model's logits for good, in its last norm, and return it."""
    model.model.norm.weight.div_(temperature)
    return model


@torch.no_grad()
def perplexity(model: Any, encoded: Sequence[Encoded], batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood of the supervised tokens, given all before them."""
    total, count = 0.0, 0
    for first in range(0, len(encoded), batch_size):
        batch = collate(encoded[first : first + batch_size], pad_token_id=0)
        log_probs = model(batch.input_ids).logits.float().log_softmax(dim=-1)
        labels = batch.input_ids[:, 1:]
        nll = -log_probs[:, :-1].gather(2, labels.unsqueeze(2)).squeeze(2)
        total += float((nll * batch.loss_mask[:, 1:]).sum())
        count += int(batch.loss_mask[:, 1:].sum())
    return math.exp(total / count)


def _rows(encoded: Sequence[Encoded], config: PocketConfig) -> Iterator[Int[Tensor, "row seq"]]:
    """Batches without end; each epoch has its own order."""
    rng = random.Random(config.seed)
    size = config.rows * config.row_length
    kept = torch.empty(0, dtype=torch.long)
    while True:
        order = list(encoded)
        rng.shuffle(order)
        kept = torch.cat([kept, *(item.input_ids for item in order)])
        while len(kept) >= size:
            yield kept[:size].view(config.rows, config.row_length)
            kept = kept[size:]


def answer_again(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    sampling: Sampling = POCKET_SAMPLING,
    batch_size: int = 256,
    progress: bool = True,
) -> list[Chat]:
    """The prompts with the target's own answers, in the order of the prompts."""
    answer = model_answer(model, tokenizer, sampling)
    records: dict[str, Record] = {}
    with tqdm(total=len(prompts), desc="answers", disable=not progress) as bar:
        for batch in make_batches(prompts, batch_size):
            records |= {record["id"]: record for record in converse(batch, answer, seed, 1)}
            bar.update(len(batch))
    own = [records[prompt.id] for prompt in prompts]
    return [Chat(tuple(r["messages"]), r["id"], r["domain"], r["finished"]) for r in own]
