"""The shipped conversations: prompts from templates, answers sampled from SmolLM2.

    python -m data.make.generate          writes data/conversations.jsonl, goes on where it stopped
    python -m data.make.generate --card   only what goes with it: tokenizer, card, checksums

Everything follows from the seed: a prompt from its index, an answer from its batch, so that an
interrupted run ends with the file that an uninterrupted one writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.make.prompts import FOLLOW_UPS, SLOTS, SYSTEM_MESSAGES, TEMPLATES
from dspark_lab.chats import SHIPPED_CHATS, load_tokenizer
from dspark_lab.files import written_whole
from dspark_lab.model import load_smollm2, save_tokenizer

Message = dict[str, str]
Record = dict[str, Any]
# From conversations that end with a user turn, and a seed, to (answer, ended by itself) of each.
Answer = Callable[[list[list[Message]], int], list[tuple[str, bool]]]

FOLLOW_UP_SHARE = 0.25
SYSTEM_SHARE = 0.1
BATCH_SIZE = 96
ATTEMPTS = 2

CARD_START = "<!-- numbers: written by python -m data.make.generate --card -->"
CARD_END = "<!-- end of numbers -->"


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are drawn: temperature, top-k, then top-p, up to a limit."""

    temperature: float = 0.7
    top_k: int = 256
    top_p: float = 0.9
    max_new_tokens: int = 320


@dataclass(frozen=True)
class Prompt:
    """The user's turns, and perhaps a system message, before any answer exists."""

    id: str
    domain: str
    template: int
    system: str | None
    users: tuple[str, ...]


def make_prompts(count: int, seed: int, follow_up_share: float = FOLLOW_UP_SHARE) -> list[Prompt]:
    """`count` distinct prompts, the domains taking turns: math-0001, code-0001, chat-0001, ..."""
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    domains = list(TEMPLATES)
    seen: set[str] = set()
    prompts = []
    for number in range(count):
        domain, index = domains[number % len(domains)], number // len(domains)
        rng = random.Random(f"{seed}/{domain}/{index}")
        template = index % len(TEMPLATES[domain])
        question = _fill(TEMPLATES[domain][template], rng)
        while question in seen:
            question = _fill(TEMPLATES[domain][template], rng)
        seen.add(question)
        users = [question]
        if rng.random() < follow_up_share:
            users.append(_fill(rng.choice(FOLLOW_UPS[domain]), rng))
        system = rng.choice(SYSTEM_MESSAGES[domain]) if rng.random() < SYSTEM_SHARE else None
        prompts.append(Prompt(f"{domain}-{index + 1:04d}", domain, template, system, tuple(users)))
    return prompts


def distinct_prompts(templates: Mapping[str, Sequence[int]], most: int, seed: int) -> list[Prompt]:
    """Up to `most` distinct questions of each of some templates, by domain and number."""
    prompts = []
    for domain, numbers in templates.items():
        for number in numbers:
            rng = random.Random(f"{seed}/{domain}/{number}")
            template = TEMPLATES[domain][number]
            drawn = dict.fromkeys(_fill(template, rng) for _ in range(8 * most))
            for index, question in enumerate(list(drawn)[:most]):
                prompts.append(
                    Prompt(f"{domain}-{number}-{index}", domain, number, None, (question,))
                )
    return prompts


def make_batches(prompts: Iterable[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches that finish about together: one domain, one number of turns, similar templates."""
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.domain, len(prompt.users)), []).append(prompt)
    batches = []
    for group in groups.values():
        group.sort(key=lambda prompt: (prompt.template, prompt.id))
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def generate(
    out: Path,
    prompts: Sequence[Prompt],
    answer: Answer,
    seed: int,
    batch_size: int = BATCH_SIZE,
    attempts: int = ATTEMPTS,
) -> None:
    """Answer every prompt that `out` does not hold yet, then put the lines in prompt order."""
    records = {record["id"]: record for record in read_records(out)}
    _check_same_prompts(out, records, prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(prompts), initial=len(records), unit="conversation") as progress:
        for batch in make_batches(prompts, batch_size):
            missing = {prompt.id for prompt in batch} - records.keys()
            if not missing:
                continue
            # The whole batch is sampled again even if a part is there: one seed, one batch.
            played = converse(batch, answer, seed, attempts)
            new = [record for record in played if record["id"] in missing]
            with out.open("a", encoding="utf-8") as file:
                file.write(_lines(new))
            records |= {record["id"]: record for record in new}
            progress.update(len(new))
    write_records((records[prompt.id] for prompt in prompts), out)


def converse(
    batch: Sequence[Prompt], answer: Answer, seed: int, attempts: int = ATTEMPTS
) -> list[Record]:
    """Play the batch turn by turn.

    An answer that was cut off is tried again; if no attempt ends, the conversation does, there.
    """
    records: list[Record] = []
    for prompt in batch:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        records.append(
            {"id": prompt.id, "domain": prompt.domain, "messages": system, "finished": True}
        )
    for turn in range(max(len(prompt.users) for prompt in batch)):
        going = []
        for prompt, record in zip(batch, records, strict=True):
            if record["finished"] and turn < len(prompt.users):
                record["messages"].append({"role": "user", "content": prompt.users[turn]})
                going.append(record)
        replies: dict[str, tuple[str, bool]] = {}
        for attempt in range(attempts):
            pending = [r for r in going if not (r["id"] in replies and replies[r["id"]][1])]
            if pending:
                rng = random.Random(f"{seed}/{batch[0].id}/{turn}/{attempt}")
                answers = answer([r["messages"] for r in pending], rng.getrandbits(63))
                replies |= zip([r["id"] for r in pending], answers, strict=True)
        for record in going:
            text, record["finished"] = replies[record["id"]]
            record["messages"].append({"role": "assistant", "content": text})
    return records


def read_records(path: Path) -> list[Record]:
    """The complete lines of the file; a last line torn by a kill is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return [json.loads(line) for line in data[:end].splitlines()]


def write_records(records: Iterable[Record], path: Path) -> None:
    """Write one record a line, all or none of them."""
    with written_whole(path) as partial:
        partial.write_text(_lines(records), encoding="utf-8")


def complete_folder(conversations: Path) -> None:
    """Add the tokenizer where it is missing, then rewrite the card's numbers and the checksums."""
    folder = conversations.parent
    if not (folder / "tokenizer").exists():
        save_tokenizer(load_smollm2()[1], folder / "tokenizer")
    card = folder / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition(CARD_START)
    _, _, after = rest.partition(CARD_END)
    if not after:
        raise ValueError(f"{card} must hold the lines {CARD_START!r} and {CARD_END!r}")
    numbers = card_numbers(read_records(conversations), load_tokenizer(folder / "tokenizer"))
    text = f"{before}{CARD_START}\n\n{numbers}\n{CARD_END}{after}"
    card.write_text(text, encoding="utf-8")
    (folder / "SHA256SUMS").write_text(checksums(folder), encoding="utf-8")


def card_numbers(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> str:
    """Markdown: the sampling settings, and the counts of each domain."""
    how = Sampling()
    lines = [
        f"Temperature {how.temperature}, top-k {how.top_k}, top-p {how.top_p}, at most "
        f"{how.max_new_tokens} tokens an answer, at most {ATTEMPTS} attempts to end before that.",
        "",
        "| domain | conversations | with a second question | with a system message | answers "
        "| assistant tokens | finished |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for domain in [*TEMPLATES, "all"]:
        chosen = [record for record in records if domain in ("all", record["domain"])]
        messages = [message for record in chosen for message in record["messages"]]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        tokens = tokenizer(answers, add_special_tokens=False)["input_ids"] if answers else []
        systems = sum(message["role"] == "system" for message in messages)
        questions = sum(message["role"] == "user" for message in messages)
        finished = sum(record["finished"] for record in chosen) / max(len(chosen), 1)
        lines.append(
            f"| {domain} | {len(chosen)} | {questions - len(chosen)} | {systems} | {len(answers)} "
            f"| {sum(map(len, tokens)):,} | {finished:.1%} |"
        )
    return "\n".join(lines) + "\n"


def checksums(folder: Path) -> str:
    """Checksums of all files but `make/` and SHA256SUMS, as `sha256sum` prints them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in files
        if path.name != "SHA256SUMS" and folder / "make" not in path.parents
    )


def model_answer(model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Answer:
    """A model with a ChatML template as an `Answer`, by `generate` of transformers."""
    tokenizer.padding_side = "left"
    end = tokenizer.get_vocab()["<|im_end|>"]
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    blank = [token for token, text in enumerate(texts) if not text.strip()]
    markers = [token for token in tokenizer.added_tokens_decoder if token != end]

    def answer(conversations: list[list[Message]], seed: int) -> list[tuple[str, bool]]:
        inputs: Any = tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # An answer is plain text that starts with something to read.
            rows = model.generate(
                **inputs,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=end,
                pad_token_id=end,
                suppress_tokens=markers,
                begin_suppress_tokens=[*markers, *blank, end],
            )
        answers = rows[:, inputs["input_ids"].shape[1] :].tolist()
        finished = [end in tokens for tokens in answers]
        texts = tokenizer.batch_decode([[t for t in tokens if t != end] for tokens in answers])
        return list(zip(texts, finished, strict=True))

    return answer


def _check_same_prompts(out: Path, records: dict[str, Record], prompts: Sequence[Prompt]) -> None:
    questions = {prompt.id: prompt.users[0] for prompt in prompts}
    for id_, record in records.items():
        said = next(m["content"] for m in record["messages"] if m["role"] == "user")
        if questions.get(id_) != said:
            raise ValueError(
                f"{out} was started with other settings: its {id_} asks {said!r}, "
                f"this run would ask {questions.get(id_)!r}; delete it or choose another --out"
            )


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _fill(template: str, rng: random.Random) -> str:
    """Replace each `{slot}` by a draw from its list.

    A slot that is named twice keeps its value; `{slot2}`, `{slot3}` are further, distinct draws.
    """
    values: dict[str, str] = {}

    def draw(match: re.Match[str]) -> str:
        slot, kind = match.group(1), match.group(1).rstrip("0123456789")
        while slot not in values:
            value = str(rng.choice(SLOTS[kind]))
            if value not in values.values():
                values[slot] = value
        return values[slot]

    return re.sub(r"\{(\w+)\}", draw, template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED_CHATS, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=720, help="conversations, all domains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", action="store_true", help="only the card and what goes with it")
    options = parser.parse_args()
    if not options.card:
        prompts = make_prompts(options.count, options.seed)
        generate(options.out, prompts, model_answer(*load_smollm2(), Sampling()), options.seed)
    if options.card or options.out == SHIPPED_CHATS:
        complete_folder(options.out)


if __name__ == "__main__":
    main()
