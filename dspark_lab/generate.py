"""The shipped conversations: prompts from templates, answers sampled from SmolLM2.

    python -m dspark_lab.generate          writes data/conversations.jsonl, goes on where it stopped
    python -m dspark_lab.generate --card   only what goes with it: tokenizer, card, checksums

This file knows templates, sampling and the file format. It does not know how conversations become
batches or what is trained on them. Everything follows from the seed: a prompt from its index, an
answer from its batch, so that an interrupted run ends with the file that an uninterrupted one
writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from dspark_lab.chats import SHIPPED_CHATS, load_tokenizer

Message = dict[str, str]
Record = dict[str, Any]
# From conversations that end with a user turn, and a seed, to (answer, ended by itself) of each.
Answer = Callable[[list[list[Message]], int], list[tuple[str, bool]]]

MULTI_TURN_SHARE = 0.25
SYSTEM_SHARE = 0.1
BATCH_SIZE = 96
TEMPERATURE = 0.7
TOP_K = 256
TOP_P = 0.9
MAX_NEW_TOKENS = 320
ATTEMPTS = 2

CARD_START = "<!-- numbers: written by python -m dspark_lab.generate --card -->"
CARD_END = "<!-- end of numbers -->"


@dataclass(frozen=True)
class Prompt:
    """What the user (and perhaps a system message) says, before any answer exists."""

    id: str
    domain: str
    template: int
    system: str | None
    users: tuple[str, ...]


def make_prompts(count: int, seed: int) -> list[Prompt]:
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
        if rng.random() < MULTI_TURN_SHARE:
            users.append(_fill(rng.choice(FOLLOW_UPS[domain]), rng))
        system = rng.choice(SYSTEM_MESSAGES[domain]) if rng.random() < SYSTEM_SHARE else None
        prompts.append(Prompt(f"{domain}-{index + 1:04d}", domain, template, system, tuple(users)))
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
) -> None:
    """Answers every prompt that `out` does not hold yet, then puts the lines in prompt order."""
    records = {record["id"]: record for record in read_records(out)}
    _check_same_prompts(out, records, prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(prompts), initial=len(records), unit="conversation") as progress:
        for batch in make_batches(prompts, batch_size):
            missing = {prompt.id for prompt in batch} - records.keys()
            if not missing:
                continue
            # The whole batch is sampled again even if a part is there: one seed, one batch.
            new = [record for record in converse(batch, answer, seed) if record["id"] in missing]
            with out.open("a", encoding="utf-8") as file:
                file.write(_lines(new))
            records |= {record["id"]: record for record in new}
            progress.update(len(new))
    ordered = out.with_suffix(".tmp")
    ordered.write_text(_lines(records[prompt.id] for prompt in prompts), encoding="utf-8")
    os.replace(ordered, out)


def converse(batch: Sequence[Prompt], answer: Answer, seed: int) -> list[Record]:
    """Plays the batch turn by turn.

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
        for attempt in range(ATTEMPTS):
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


def complete_folder(conversations: Path) -> None:
    """Adds the tokenizer where it is missing, rewrites the numbers in the card, then checksums."""
    folder = conversations.parent
    if not (folder / "tokenizer").exists():
        from dspark_lab.target import load_smollm2, save_tokenizer

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
    """Markdown: the sampling settings, and what each domain counts."""
    lines = [
        f"Temperature {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}, at most {MAX_NEW_TOKENS} tokens "
        f"an answer, at most {ATTEMPTS} attempts to end before that.",
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
    """Of every file in the folder but SHA256SUMS itself, as `sha256sum` prints them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in files
        if path.name != "SHA256SUMS"
    )


def smollm2_answer() -> Answer:
    """SmolLM2 as an `Answer`: the chat template, then batched sampling."""
    from dspark_lab.target import load_smollm2

    model, tokenizer = load_smollm2()
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
        # An answer is plain text that starts with something to read.
        answers = sample(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            end=end,
            never=markers,
            never_first=[*markers, *blank, end],
            generator=torch.Generator().manual_seed(seed),
        )
        finished = [tokens[-1] == end for tokens in answers]
        texts = tokenizer.batch_decode([[t for t in tokens if t != end] for tokens in answers])
        return list(zip(texts, finished, strict=True))

    return answer


@torch.inference_mode()
def sample(
    model: torch.nn.Module,
    ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    *,
    end: int,
    never: list[int],
    never_first: list[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """The tokens that follow each left-padded row, up to and with `end` or MAX_NEW_TOKENS of them.

    Rows leave the batch as soon as they end, which halves the time of the batch.
    """
    answers: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))
    cache = DynamicCache()
    for step in range(MAX_NEW_TOKENS):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        logits[:, never if step else never_first] = -torch.inf
        ids = _draw(logits, generator)
        for row, token in zip(going, ids[:, 0].tolist(), strict=True):
            answers[row].append(token)
        keep = (ids[:, 0] != end).nonzero()[:, 0]
        if len(keep) == 0:
            break
        if len(keep) < len(going):
            cache.batch_select_indices(keep)
            ids, mask, going = ids[keep], mask[keep], [going[i] for i in keep.tolist()]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return answers


def _draw(
    logits: Float[Tensor, "batch vocab"], generator: torch.Generator
) -> Int[Tensor, "batch 1"]:
    """One token per row: top-k, then the smallest set of them that holds TOP_P of the mass."""
    values, tokens = (logits / TEMPERATURE).topk(TOP_K)
    probs = values.softmax(dim=-1)
    probs[probs.cumsum(dim=-1) - probs >= TOP_P] = 0
    return tokens.gather(1, probs.multinomial(1, generator=generator))


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
    """Replaces each `{slot}` by a draw from its list.

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


SLOTS: dict[str, Sequence[str] | Sequence[int]] = {
    "tiny": range(2, 10),
    "small": range(6, 20),
    "medium": range(21, 99),
    "large": range(105, 990),
    "percent": (5, 10, 15, 20, 25, 30, 35, 40, 60, 75),
    "decimal": ("0.4", "1.25", "2.5", "3.75", "4.2", "6.5", "7.8", "12.5", "19.9"),
    "fraction": ("1/2", "1/3", "3/4", "2/5", "5/6", "3/8", "4/7", "5/9", "7/10"),
    "name": (
        "Amara", "Bruno", "Chiara", "Deniz", "Elif", "Farid", "Greta", "Hiro", "Ines", "Jonas",
        "Kofi", "Leila", "Mateo", "Nadia", "Oskar", "Priya", "Rosa", "Samir", "Tomas", "Uma",
        "Viktor", "Wanda", "Yuki", "Zoe",
    ),
    "thing": (
        "notebooks", "candles", "postcards", "tulip bulbs", "lanterns", "wooden spoons", "kites",
        "clay mugs", "marbles", "stamps", "buttons", "comic books", "seed packets", "puzzles",
        "scarves", "jars of honey",
    ),
    "shop": (
        "bakery", "bookshop", "garden centre", "bike workshop", "toy shop", "flower stall",
        "fish market", "pottery studio", "music shop",
    ),
    "vehicle": ("tram", "ferry", "delivery van", "cargo bike", "night train", "bus", "canoe"),
    "language": ("Python", "Python", "Python", "JavaScript", "Java", "Go", "C", "Ruby", "Rust"),
    "data": (
        "temperatures", "order totals", "file sizes", "test scores", "ages", "prices",
        "page counts", "heart rates", "rainfall readings", "delivery times", "word lengths",
    ),
    "field": ("name", "city", "colour", "year", "author", "category", "country", "status"),
    "record": (
        "books", "songs", "customers", "invoices", "recipes", "plants", "tickets", "bicycles",
        "students", "parcels",
    ),
    "concept": (
        "recursion", "a hash table", "a stack", "a queue", "a linked list", "binary search",
        "a regular expression", "an exception", "a closure", "a race condition", "an API",
        "unit testing", "version control", "a primary key", "caching", "a pointer",
    ),
    "class": (
        "BankAccount", "Playlist", "Thermostat", "ShoppingCart", "Elevator", "Library",
        "ParkingLot", "Counter", "Inventory", "Timer",
    ),
    "animal": (
        "otter", "owl", "hedgehog", "octopus", "goat", "crow", "turtle", "bat", "fox", "bee",
        "penguin", "camel",
    ),
    "city": (
        "Lisbon", "Kyoto", "Montreal", "Nairobi", "Krakow", "Lima", "Istanbul", "Oslo", "Hanoi",
        "Edinburgh", "Marrakesh", "Melbourne",
    ),
    "food": (
        "lentil soup", "flatbread", "apple crumble", "fried rice", "tomato sauce", "pancakes",
        "potato salad", "hummus", "vegetable curry", "scrambled eggs", "oat cookies",
    ),
    "hobby": (
        "watercolour painting", "chess", "birdwatching", "knitting", "bouldering", "gardening",
        "playing the ukulele", "astronomy", "baking bread", "photography", "running", "pottery",
    ),
    "job": (
        "nurse", "carpenter", "librarian", "pilot", "beekeeper", "translator", "firefighter",
        "architect", "baker", "geologist", "teacher",
    ),
    "science": (
        "the tides", "a rainbow", "photosynthesis", "magnetism", "an earthquake", "fermentation",
        "the seasons", "static electricity", "a solar eclipse", "echoes", "evaporation",
        "the northern lights", "rust", "yeast making dough rise",
    ),
    "habit": (
        "going to bed earlier", "reading every day", "drinking more water", "saving money",
        "stretching in the morning", "using the phone less", "cooking at home", "walking to work",
    ),
    "place": (
        "an old lighthouse", "a mountain hut", "a night market", "an empty railway station",
        "a rooftop garden", "a small island", "a repair shop", "a library after closing time",
    ),
    "event": (
        "a birthday party", "a neighbourhood clean-up", "a school concert", "a picnic",
        "a book swap", "a farewell lunch", "a chess evening", "a housewarming",
    ),
    "quality": ("patience", "curiosity", "honesty", "courage", "kindness", "humour", "discipline"),
    "mood": ("cheerful", "mysterious", "gentle", "funny", "melancholic", "hopeful"),
}  # fmt: skip

# Ordered, within a domain, from short to long answers: neighbours share a batch.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "math": (
        "What is {medium} + {large}?",
        "Is {large} divisible by {tiny}? Say how you know in one sentence.",
        "Round {decimal} to the nearest whole number and say why.",
        "Which is larger, {fraction} or {fraction2}? Explain briefly.",
        "Write {fraction} as a decimal and as a percentage.",
        "How many minutes are there in {small} hours and {medium} minutes?",
        "Convert {medium} kilometres into metres and explain the step.",
        "What is {percent}% of {large}?",
        "Calculate {medium} x {small} in your head and tell me the trick you used.",
        "A clock shows {tiny}:15. What time will it show {large} minutes later?",
        "What is the remainder when {large} is divided by {small}?",
        "Find the average of {medium}, {medium2} and {medium3}.",
        "Simplify the expression {tiny}x + {small}x - {tiny2}.",
        "A square has an area of {tiny}{tiny2}0 square centimetres. How long is one side, roughly?",
        "Solve {tiny}x + {medium} = {large} for x.",
        "The sum of two consecutive numbers is {medium}. Can both be whole numbers? Explain.",
        "{name} has {medium} {thing} and gives {small} of them to {name2}. How many are left?",
        "One of the {thing} at the {shop} costs {decimal} euros. What do {small} of them cost?",
        "A {vehicle} covers {medium} kilometres in an hour. How far does it get in {tiny} hours?",
        "Write {large} as a product of prime factors.",
        "What is the area of a rectangle that is {medium} cm long and {decimal} cm wide?",
        "What is the circumference of a circle with a radius of {small} cm? Use 3.14 for pi.",
        "{name} saves {small} euros a week. After how many weeks are there {large} euros?",
        "The {shop} lowers the price of a {large} euro item by {percent}%. What is the new price?",
        "A recipe for {tiny} people needs {large} grams of flour. How much is it for {small}?",
        "{name} is {small} years older than {name2}. Together they are {medium} years old. "
        "How old is each of them?",
        "A tank holds {large} litres and loses {tiny} litres an hour. When is it half empty?",
        "In a box there are {small} red and {tiny} blue {thing}. What is the chance of drawing "
        "a blue one?",
        "{name} packs {large} {thing} into boxes of {small}. How many full boxes are there, and "
        "how many {thing} are left over?",
        "The {vehicle} leaves at {tiny}:40 and needs {large} minutes. When does it arrive? "
        "Show your steps.",
        "Find the next three terms of the sequence {tiny}, {small}, {medium} if every term is the "
        "one before plus a growing step. Say which rule you chose.",
        "Two numbers add up to {medium} and their difference is {tiny}. Find them step by step.",
        "Expand (x + {tiny})(x - {small}) and explain every step.",
        "Solve the system x + y = {medium} and x - y = {small}.",
        "Find the roots of x^2 - {small}x + {tiny} = 0, or say that there are none.",
        "{name} walks {tiny} km north and then {small} km east. How far from the start is that "
        "in a straight line?",
        "The {shop} sold {medium} {thing} on Monday, {percent}% more on Tuesday and {tiny} fewer "
        "on Wednesday than on Tuesday. How many were sold on each day?",
        "How many ways are there to arrange {tiny} different {thing} on a shelf? Explain the "
        "idea first.",
        "{name} invests {large} euros at {percent}% interest a year. How much is it after "
        "{tiny} years? Show the value for each year.",
        "A {vehicle} travels {large} km at {medium} km/h and returns at {medium2} km/h. What is "
        "the average speed of the round trip?",
        "Explain to a twelve-year-old how to add {fraction} and {fraction2}, and work it out.",
        "Prove that the sum of {tiny} even numbers is always even.",
        "Explain what a percentage is, using {thing} and the number {large} as an example.",
        "Make up a word problem about {thing} whose answer is {medium}, then solve it.",
        "Explain long division with the example {large} divided by {small}.",
    ),
    "code": (
        "In {language}, how do I get the length of a string? One line, please.",
        "Which {language} operator gives the remainder of a division? Show {medium} and {tiny}.",
        "In one sentence, what is {concept}?",
        "Write a regular expression that matches a number with exactly {tiny} digits.",
        "Write a shell command that counts the files in a folder named {record}.",
        "Write an SQL query that returns all {record} ordered by {field}.",
        "Write an SQL query that counts the {record} for each {field}.",
        "Show me a {language} one-liner that builds a list of the squares up to {small}.",
        "How do I reverse a list of {data} in {language}?",
        "How do I read a text file named {record}.txt line by line in {language}?",
        "What does `{record}[{tiny}:]` do in Python? Give a short example.",
        "What does the Python error `KeyError: '{field}'` mean and how can I avoid it?",
        "Write a Python function that returns the largest of a list of {data}.",
        "Write a Python function that counts how many {data} are above {medium}.",
        "Write a Python function that removes duplicates from a list of {record}, keeping order.",
        "Write a {language} function that checks if a number is divisible by {tiny} and {small}.",
        "Write a {language} function that computes the average of an array of {data}.",
        "Write a {language} loop that prints every multiple of {tiny} up to {large}.",
        "Write a {language} function that converts minutes into hours and minutes.",
        "Write a Python dictionary comprehension that maps each of the {record} to its {field}.",
        "Write a Python function that groups {record} by {field}.",
        "Write a Python function that finds the two smallest {data} in a list.",
        "Write a Python function that returns the moving average of {data} with a window of "
        "{tiny}.",
        "Write a {language} function that counts the vowels of a sentence.",
        "Write a {language} function that checks whether two words use the same letters.",
        "Write a Python function that splits a list of {record} into chunks of {tiny}.",
        "Write a Python function that merges two sorted lists of {data}.",
        "Write a Python generator that yields {data} one by one until one exceeds {large}.",
        "Write a Python decorator that prints how long a function took to load {record}.",
        "Write a Python function that loads {record} from a CSV file and returns those whose "
        "{field} is not empty.",
        "Write a Python function that retries an action {tiny} times before it gives up.",
        "Write a Python dataclass for {record} with the fields {field} and {field2}, and create "
        "one.",
        "Write a unit test for a function `add_{field}` that appends a {field} to a list.",
        "Write a function in {language} that returns the first {small} Fibonacci numbers.",
        "Write the HTML for a table of {record} with the columns {field} and {field2}.",
        "Write a CSS rule set that shows {record} as cards, {tiny} in a row.",
        "Refactor this Python code so that it is easier to read:\n\n"
        "```python\ndef f(l):\n    r = []\n    for i in range(len(l)):\n"
        "        if l[i] > {medium}:\n            r.append(l[i] * {tiny})\n    return r\n```",
        "Find the bug in this Python function and fix it:\n\n"
        "```python\ndef mean(values):\n    total = {tiny}\n    for value in values:\n"
        "        total += value\n    return total / len(values)\n```",
        "What does this Python code print, and why?\n\n"
        "```python\nvalues = [{tiny}, {small}, {medium}]\n"
        "for i, value in enumerate(values):\n    print(i, value * i)\n```",
        "Explain {concept} to a beginner, with a small {language} example.",
        "What is the difference between {concept} and {concept2}?",
        "Write a Python class `{class}` with two methods and show how to use it.",
        "Write a {language} program that asks for a number and guesses it within {small} tries.",
        "Write a small command line tool in Python that adds, lists and removes {record}.",
        "Describe step by step how you would test a program that sorts {record} by {field}.",
    ),
    "chat": (
        "Suggest a name for a pet {animal}.",
        "What should I wear for a rainy day in {city}? One sentence.",
        "Say thank you to {name}, a {job}, in one warm sentence.",
        "Give me a fun fact about the {animal}.",
        "Translate 'Where is the {shop}?' into French and Spanish.",
        "Suggest a title for a story about {place}.",
        "What do you call someone who is interested in {hobby}?",
        "Is it hard to start with {hobby}? Answer in two sentences.",
        "Write a haiku about {place}.",
        "In two or three sentences, what causes {science}?",
        "Rewrite this more politely: '{name}, send me the list of {thing} now.'",
        "Correct the grammar: 'Yesterday {name} go to the {shop} and buyed {tiny} {thing}.'",
        "Write a short invitation to {event}.",
        "Give me three reasons to visit {city}.",
        "Give me {tiny} synonyms or phrases for {quality}.",
        "What goes well with {food}?",
        "Write a riddle whose answer is '{animal}'.",
        "Write a text message that tells {name} that I am {medium} minutes late for {event}.",
        "List {tiny} things to pack for a weekend in {city}.",
        "Write a product description for hand-made {thing} in three sentences.",
        "Describe {place} to someone who can't see it, in one paragraph.",
        "What does a {job} do on a normal day? Keep it short.",
        "How do I know if {hobby} is the right hobby for me?",
        "Explain {science} to a child of {tiny}.",
        "Summarise in two sentences why {quality} matters for a {job}.",
        "My friend {name} is sad after losing a job as a {job}. What could I say?",
        "Write a {mood} poem of two stanzas about {place}.",
        "Write a short dialogue between a {job} and a customer of a {shop}.",
        "Give me {tiny} questions to ask a {job} in an interview.",
        "How do I make {food}? Give me the ingredients and the steps.",
        "I have only {food} ingredients and {medium} minutes. What can I cook for {tiny} people?",
        "Write a polite email to the {shop} because the {thing} arrived broken.",
        "Write a {mood} story of about 100 words about a {animal} and a {job}.",
        "Plan one relaxed day in {city} for {name} and {name2}, in three short points.",
        "Give me {tiny} short tips for {habit}.",
        "How can a {job} find time for {hobby}?",
        "Compare living in {city} with living in {city2} in one paragraph.",
        "Is {quality} more important than {quality2}? Give one reason for each side.",
        "Invent a simple game that {tiny} people can play with {thing}.",
        "Describe how {event} could be organised with {large} euros.",
        "Write a toast of four sentences for {event} of {name}, a {job}.",
        "Name two pros and two cons of {habit}.",
        "Write the first paragraph of a {mood} novel that is set in {place} near {city}.",
        "Make a four-week plan for someone who starts with {hobby}. One line a week.",
        "How did people explain {science} in the past, and how do we today? Be brief.",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "math": (
        "Can you check that with different numbers, say {medium} and {small}?",
        "Are you sure? Please check your result another way.",
        "Explain the first step again, more slowly.",
        "What changes if the first number is doubled?",
        "Now write the same as a single formula.",
        "Give me a similar exercise to practise, without the solution.",
        "How would you estimate this without a calculator?",
        "Which mistake do people usually make here?",
        "What is the general rule behind this?",
        "Now answer in one short sentence.",
        "Could you explain that to {name}, who is ten years old?",
        "And what would it be with {large} instead?",
    ),
    "code": (
        "Can you add a comment to each line?",
        "What happens if the input is empty?",
        "Now write it in Python if it isn't, or in JavaScript if it is.",
        "Please add a short test for it.",
        "How fast is it for {large} items?",
        "Can you make it shorter?",
        "Use clearer names, please.",
        "Show an example with its output.",
        "How would you handle invalid input?",
        "Explain it to someone who has never programmed.",
        "What would you change to use it on {record}?",
        "Is there a built-in way to do this?",
    ),
    "chat": (
        "Can you make it shorter?",
        "Make it a bit more {mood}.",
        "Why do you think so?",
        "Give me one more, please, and a different one.",
        "What would {name}, a {job}, say about it?",
        "Now say it as if you were talking to a child.",
        "Which part of this is the most important?",
        "Can you give an example?",
        "I have only {small} minutes. What should I start with?",
        "Is there anything that I should avoid?",
        "Turn that into a list of three points.",
        "And how would it be in {city}?",
    ),
}

SYSTEM_MESSAGES: dict[str, tuple[str, ...]] = {
    "math": (
        "You are a patient maths tutor. Show short, clear steps.",
        "You answer maths questions. End with a line that starts with 'Answer:'.",
        "You are a careful assistant who checks every calculation.",
        "Answer as briefly as you can.",
    ),
    "code": (
        "You are a senior programmer. Prefer simple code to clever code.",
        "You are a programming assistant. Put code into fenced blocks.",
        "You help beginners to program. Avoid jargon.",
        "Answer with code first and then one sentence of explanation.",
    ),
    "chat": (
        "You are a friendly assistant. Keep answers short.",
        "You are a helpful assistant who writes plain English.",
        "You are a witty companion who likes examples.",
        "Answer in at most three sentences.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED_CHATS, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=720, help="conversations, all domains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", action="store_true", help="only the card and what goes with it")
    options = parser.parse_args()
    if not options.card:
        prompts = make_prompts(options.count, options.seed)
        generate(options.out, prompts, smollm2_answer(), options.seed)
    if options.card or options.out == SHIPPED_CHATS:
        complete_folder(options.out)


if __name__ == "__main__":
    main()
