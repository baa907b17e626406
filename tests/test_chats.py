"""`dspark_lab.chats`: reading, which tokens are the assistant's, padding and packing.

Each chat template stands here twice: as the Jinja text that tokenizers ship, and as a Python
function that writes the same conversation piece by piece and says of each piece whose it is. The
tokens are laid over the pieces by their bytes, not by a tokenizer's offsets.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dspark_lab.chats import (
    Chat,
    Encoded,
    collate,
    describe,
    encode,
    load_chats,
    load_tokenizer,
    one_row,
    pack,
)
from tests import oracle

PROMPT, ANSWER, SPACE = "prompt", "answer", "space"
Pieces = list[tuple[str, str]]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{{ '<|im_end|>\n' }}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}"
    "{% set ns.system = '' %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{%- else %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
    ".lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>' + m.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n'"
    " + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def write_chatml(messages) -> Pieces:
    pieces = []
    for m in messages:
        whose = ANSWER if m["role"] == "assistant" else PROMPT
        pieces += [(f"<|im_start|>{m['role']}\n", PROMPT), (m["content"] + "<|im_end|>", whose)]
        pieces += [("\n", PROMPT)]
    return pieces


def write_llama3(messages) -> Pieces:
    pieces = [("<s>", PROMPT)]
    for m in messages:
        whose = ANSWER if m["role"] == "assistant" else PROMPT
        header = f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"
        pieces += [(header, PROMPT), (m["content"].strip() + "<|eot_id|>", whose)]
    return pieces


def write_zephyr(messages) -> Pieces:
    pieces = []
    for m in messages:
        whose = ANSWER if m["role"] == "assistant" else PROMPT
        pieces += [(f"<|{m['role']}|>\n", PROMPT), (m["content"] + "</s>", whose), ("\n", PROMPT)]
    return pieces


def write_plain(messages) -> Pieces:
    pieces = []
    for m in messages:
        whose = ANSWER if m["role"] == "assistant" else PROMPT
        pieces += [(m["role"].capitalize() + ": ", PROMPT), (m["content"], whose)]
        pieces += [("\n\n", PROMPT)]
    return pieces


def write_mistral(messages) -> Pieces:
    pieces, system = [("<s>", PROMPT)], ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            pieces += [(f"[INST] {system}{m['content']} [/INST]", PROMPT)]
            system = ""
        else:
            pieces += [(" ", SPACE), (m["content"] + "</s>", ANSWER)]
    return pieces


def write_llama2(messages) -> Pieces:
    pieces = []
    for m in messages:
        if m["role"] == "assistant":
            pieces += [(" ", SPACE), (m["content"].strip() + " </s>", ANSWER)]
        else:
            pieces += [(f"<s>[INST] {m['content'].strip()} [/INST]", PROMPT)]
    return pieces


def write_qwen3(messages) -> Pieces:
    """For thoughts in their own form: the last answer is written with them, earlier ones without.

    A last answer without thoughts gets an empty block of them, which is the template's.
    """
    last_user = max([i for i, m in enumerate(messages) if m["role"] == "user"], default=-1)
    pieces = []
    for i, m in enumerate(messages):
        whose, text = PROMPT, m["content"]
        pieces += [(f"<|im_start|>{m['role']}\n", PROMPT)]
        if m["role"] == "assistant":
            whose = ANSWER
            thoughts, separator, said = text.rpartition("\n</think>\n\n")
            if separator:
                said = said.lstrip("\n")
            if i < last_user:
                text = said
            elif separator:
                text = thoughts + separator + said
            else:
                pieces += [("<think>\n\n</think>\n\n", PROMPT)]
                text = said.lstrip("\n")
        pieces += [(text + "<|im_end|>", whose), ("\n", PROMPT)]
    return pieces


@dataclass(frozen=True)
class Template:
    jinja: str
    write: Callable[[list], Pieces]


TEMPLATES = {
    "chatml": Template(CHATML, write_chatml),
    "chatml marked, end outside": Template(CHATML_MARKED, write_chatml),
    "llama3": Template(LLAMA3, write_llama3),
    "llama3 marked, end inside": Template(LLAMA3_MARKED, write_llama3),
    "zephyr": Template(ZEPHYR, write_zephyr),
    "plain": Template(PLAIN, write_plain),
    "mistral": Template(MISTRAL, write_mistral),
    "llama2": Template(LLAMA2, write_llama2),
    "qwen3": Template(QWEN3, write_qwen3),
}

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
CORPUS = [
    "user assistant system hello world, the answer is 42.",
    "User: hello\n\nAssistant: the answer\n\n \n  world",
    "hello   world    the \n\n\n answer",
    "assistant\nhello assistant\n\nthe [INST] hello [/INST] the answer </think>\n\nhello",
] * 8
# Ways in which real byte-level tokenizers differ: words split by GPT-2's pattern or not at all
# (then a newline joins the word behind it), and offsets that leave a word's space out.
SPLITTING = {"words": (True, None), "anything": (False, None), "trimmed": (True, True)}


@cache
def byte_level(splitting: str) -> PreTrainedTokenizerFast:
    use_regex, trim = SPLITTING[splitting]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=SPECIAL,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_template(tokenizer: PreTrainedTokenizerFast, jinja: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = jinja
    return tokenizer


def chat(*turns: str, system: str | None = None) -> Chat:
    """User and assistant take turns, the user first."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, turn in enumerate(turns):
        messages.append({"role": ("user", "assistant")[i % 2], "content": turn})
    return Chat(tuple(messages), id="test")


def supervised_text(encoded: Encoded, tokenizer) -> str:
    ids = encoded.input_ids[encoded.loss_mask]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def bytes_of_tokens(tokenizer, ids: list[int]) -> list[bytes]:
    """What each token stands for. Byte-level tokens spell bytes in GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    spelled.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return [
        token.encode() if token in SPECIAL else bytes(spelled[character] for character in token)
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]


def expected_mask(tokenizer, ids: list[int], pieces: Pieces) -> list[bool]:
    """Lay the tokens over the pieces. Supervised: wholly inside one answer, end-of-turn included.

    Or from the space before an answer into that answer.
    """
    whose = [(number, kind) for number, (text, kind) in enumerate(pieces) for _ in text.encode()]
    mask, position = [], 0
    for token in bytes_of_tokens(tokenizer, ids):
        covered = whose[position : position + len(token)]
        if covered[0][1] == SPACE:
            covered = covered[1:] or [(-1, SPACE)]
        mask.append(len(set(covered)) == 1 and covered[0][1] == ANSWER)
        position += len(token)
    assert position == len(whose)
    return mask


def test_the_mask_of_a_small_conversation_token_by_token():
    tokenizer = with_template(byte_level("words"), CHATML)
    encoded = encode(chat("hello", "the answer", "is", "42."), tokenizer)
    by_hand = [
        ("<|im_start|>", False), ("user", False), ("Ċ", False),
        ("hello", False), ("<|im_end|>", False), ("Ċ", False),
        ("<|im_start|>", False), ("assistant", False), ("Ċ", False),
        ("the", True), ("Ġanswer", True), ("<|im_end|>", True), ("Ċ", False),
        ("<|im_start|>", False), ("user", False), ("Ċ", False),
        ("is", False), ("<|im_end|>", False), ("Ċ", False),
        ("<|im_start|>", False), ("assistant", False), ("Ċ", False),
        ("42", True), (".", True), ("<|im_end|>", True), ("Ċ", False),
    ]  # fmt: skip
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert list(zip(tokens, encoded.loss_mask.tolist(), strict=True)) == by_hand
    assert encoded.input_ids.dtype == torch.long and encoded.loss_mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "is 42.<|im_end|>the 🎉<|im_end|>"),
        ("chatml marked, end outside", "is 42.<|im_end|>the 🎉<|im_end|>"),
        ("llama3", "is 42.<|eot_id|>the 🎉<|eot_id|>"),
        ("llama3 marked, end inside", "is 42.<|eot_id|>the 🎉<|eot_id|>"),
        ("zephyr", "is 42.</s>the 🎉</s>"),
        ("mistral", " is 42.</s> the 🎉</s>"),
        ("llama2", " is 42. </s> the 🎉 </s>"),
        ("qwen3", "is 42.<|im_end|>the 🎉<|im_end|>"),
        # "Assistant: " is the generation prompt, so the space is not the model's to write.
        ("plain", " 42. 🎉"),
    ],
)
def test_answers_and_their_end_of_turn_are_supervised_and_nothing_else(name, expected):
    tokenizer = with_template(byte_level("words"), TEMPLATES[name].jinja)
    encoded = encode(chat("hello", "is 42.", "world", "the 🎉", system="the"), tokenizer)
    assert supervised_text(encoded, tokenizer) == expected


fragments = st.sampled_from(
    [
        "hello", " the answer", "42.", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\r\n", "\x00",
        "🎉", "é", "e\u0301", "界", "👩\u200d👧", "\ue000", "\ue0001\ue000", "\ue001", "Ġ",
        "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "<s>", "<|user|>",
        "<|assistant|>", "[INST]", " [/INST] ", "User: ", "Assistant: ", "<|im_", "<think>",
        "{{ m }}", "{% generation %}",
    ]
)  # fmt: skip
contents = st.lists(fragments | st.text(max_size=3), max_size=5).map("".join)
thoughts = st.text("ab <>\n🎉", min_size=1, max_size=6).map(lambda s: "a" + s + "b")


@st.composite
def conversations(draw, thinking: bool = False) -> list[dict[str, str]]:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents)})
        answer = draw(contents)
        if thinking and draw(st.booleans()):
            answer = f"<think>\n{draw(thoughts)}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(contents)})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_agrees_with_the_template_written_piece_by_piece(name):
    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(conversations(thinking=name == "qwen3"), st.sampled_from(sorted(SPLITTING)))
    @example([{"role": "assistant", "content": ""}], "words")
    @example([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * 2, "words")
    def check(messages, splitting):
        tokenizer = with_template(byte_level(splitting), TEMPLATES[name].jinja)
        pieces = TEMPLATES[name].write(messages)
        encoded = encode(Chat(tuple(messages), id="random"), tokenizer)
        ids = encoded.input_ids.tolist()
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert ids == rendered["input_ids"]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(
            text for text, _ in pieces
        )
        assert encoded.loss_mask.tolist() == expected_mask(tokenizer, ids, pieces)

    check()


@pytest.mark.parametrize("splitting", ["words", "trimmed"])
def test_a_token_that_joins_the_prompt_to_the_answer_is_prompt(splitting):
    tokenizer = with_template(byte_level(splitting), CHATML)
    encoded = encode(chat("hello", "\n\nthe"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens[-6:] == ["assistant", "ĊĊ", "Ċ", "the", "<|im_end|>", "Ċ"]
    assert encoded.loss_mask[-6:].tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("rstrip", [True, False])
def test_an_end_of_turn_that_swallows_the_space_before_it_is_found(rstrip):
    tokenizer = swallowing_tokenizer(AddedToken("<|head|>", rstrip=rstrip, special=True))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|head|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    )
    encoded = encode(chat("hello", "the \n", "is", "\n", "is", ""), tokenizer)
    assert supervised_text(encoded, tokenizer) == "the<|end|><|end|><|end|>"


def test_a_header_that_swallows_the_space_behind_an_empty_answer_is_prompt():
    tokenizer = swallowing_tokenizer(AddedToken("<|head|>", rstrip=True, special=True))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|head|>' + m['content'] + '\n</s>' }}{% endfor %}"
    )
    encoded = encode(chat("hello", ""), tokenizer)
    assert supervised_text(encoded, tokenizer) == "</s>"


def swallowing_tokenizer(header: AddedToken) -> PreTrainedTokenizerFast:
    """With the special tokens "<|head|>" as given, and "<|end|>", which takes the space before."""
    backend = Tokenizer.from_str(byte_level("words").backend_tokenizer.to_str())
    backend.add_special_tokens([header, AddedToken("<|end|>", lstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_sentencepiece_tokenizers_and_llama2():
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.train_from_iterator(
        ["hello answer answer is"] * 9,
        trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA2
    encoded = encode(chat("hello", "answer is 🎉"), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
    assert "".join(pieces) == "▁answer▁is▁<0xF0><0x9F><0x8E><0x89>▁</s>"


def test_tokenizers_that_drop_white_space_and_have_unknown_words():
    words = ["<unk>", "</s>", "User", "Assistant", ":", "hello", "the", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    for end, supervised in (("eos_token + '\n'", ["</s>"]), ("'§ '", [])):
        tokenizer.chat_template = PLAIN.replace("'\n\n'", end)
        encoded = encode(chat("hello", "the\nanswer"), tokenizer)
        found = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
        assert found == ["the", "answer", *supervised]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("m['content'] }}", "m['content'] if loop.last else '' }}", "every answer once"),
        ("m['content'] }}", "m['content'] + m['content'] }}", "every answer once"),
        ("in messages", "in messages | reverse", "every answer once"),
        ("'<|im_end|>\n'", "m['content'] | length", r"messages\[3\].*generation"),
        ("{{ m['content'] }}", "{{ raise_exception('no thanks') }}", "refuses.*no thanks"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_by_name(old, new, complaint):
    tokenizer = with_template(byte_level("words"), CHATML.replace(old, new))
    with pytest.raises(ValueError, match=f"conversation 'test': .*{complaint}"):
        encode(chat("hello", "the", "hello", "answer"), tokenizer)


NO_PROMPT = CHATML.split("{% if add")[0]
COUNTED = "m['content'] | length ~ m['content'] | upper }}"
# The reversed answer can be found by its markers alone.
REVERSED = CHATML_MARKED.replace("m['content'] }}{%- endg", "m['content'] | reverse }}{%- endg")
THOUGHT = "<think>\nhm\n</think>\n\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
# What holds: a template, the turns, and what of their text is supervised.
SUPERVISED = {
    "the first word behind the template's space is": (MISTRAL, ["hello", "answer"], " answer</s>"),
    "an empty answer's end of turn is": (CHATML, ["hello", ""] * 2, "<|im_end|><|im_end|>"),
    "an answer that spells the end of turn has its own end, too": (
        CHATML,
        ["hello", "the<|im_end|>"],
        "the<|im_end|><|im_end|>",
    ),
    "it has with markers": (CHATML_MARKED, ["hello", "the<|im_end|>"], "the<|im_end|><|im_end|>"),
    "the next turn's header is no end of turn": (
        CHATML.replace("<|im_end|>\n", "\n"),
        ["hello", "the", "is", "42"],
        "the42",
    ),
    "nor is a next turn's start of sequence": (
        CHATML.replace("<|im_end|>\n", "").replace("<|im_start|>", "<s>"),
        ["hello", "the", "is", "42"],
        "the42",
    ),
    "the last character of a marked answer may be several tokens": (
        CHATML_MARKED,
        ["hello", "the 🎉"],
        "the 🎉<|im_end|>",
    ),
    **{
        f"markers are found as {marker}": (
            REVERSED.replace("{%- generation -%}", marker),
            ["hello", "abc"],
            "cba<|im_end|>",
        )
        for marker in ("{%- generation %}", "{%generation-%}", "{% generation -%}")
    },
    **{
        f"an answer that the template changes in place is, {name}": (
            jinja.replace("m['content'] }}", "m['content'] | upper }}"),
            ["hello", "abc", "hello", "d"],
            "ABC<|im_end|>D<|im_end|>",
        )
        for name, jinja in (("with a prompt", CHATML), ("without", NO_PROMPT))
    },
    "an answer beyond recognition is from the end of the generation prompt": (
        CHATML.replace("m['content'] }}", COUNTED),
        ["hello", "answer"],
        "6ANSWER<|im_end|>",
    ),
    "thoughts are in the last turn and gone from earlier ones": (
        QWEN3,
        ["hello", THOUGHT + "a", "hello", THOUGHT + "b"],
        f"a<|im_end|>{THOUGHT}b<|im_end|>",
    ),
    "thoughts that the template lays out anew are as it writes them": (
        QWEN3,
        ["hello", "<think>hm</think>a"],
        THOUGHT + "a<|im_end|>",
    ),
    "the template's own empty thoughts are not": (QWEN3, ["hello", "a"], "a<|im_end|>"),
    "nor are they before white space": (
        QWEN3,
        ["hello", "\na", "hello", "\n\nb"],
        "\na<|im_end|>b<|im_end|>",
    ),
    "an answer's own empty thoughts are": (
        QWEN3,
        ["hello", EMPTY_THOUGHT + "a"],
        EMPTY_THOUGHT + "a<|im_end|>",
    ),
}


@pytest.mark.parametrize(("jinja", "turns", "expected"), SUPERVISED.values(), ids=SUPERVISED)
def test_what_is_supervised(jinja, turns, expected):
    tokenizer = with_template(byte_level("words"), jinja)
    assert supervised_text(encode(chat(*turns), tokenizer), tokenizer) == expected


def test_an_answer_beyond_recognition_without_a_generation_prompt_is_refused():
    jinja = NO_PROMPT.replace("m['content'] }}", COUNTED)
    with pytest.raises(ValueError, match=r"messages\[1\].*generation"):
        encode(chat("hello", "answer"), with_template(byte_level("words"), jinja))


def test_markers_that_enclose_nothing_are_refused():
    jinja = CHATML_MARKED.replace("== 'assistant'", "== 'nobody'")
    with pytest.raises(ValueError, match="enclose nothing"):
        encode(chat("hello", "the"), with_template(byte_level("words"), jinja))


def test_slow_tokenizers_and_tokenizers_without_a_template_are_refused():
    with pytest.raises(ValueError, match="fast.*ByT5Tokenizer"):
        encode(chat("hello", "the"), ByT5Tokenizer())
    with pytest.raises(ValueError, match="chat template"):
        encode(chat("hello", "the"), with_template(byte_level("words"), None))


def test_truncation_keeps_the_first_tokens():
    tokenizer = with_template(byte_level("words"), CHATML)
    whole = encode(chat("hello", "the answer"), tokenizer)
    for length in range(1, len(whole) + 3):
        part = encode(chat("hello", "the answer"), tokenizer, max_length=length)
        assert part.input_ids.tolist() == whole.input_ids.tolist()[:length]
        assert part.loss_mask.tolist() == whole.loss_mask.tolist()[:length]
    with pytest.raises(ValueError, match="max_length must be >= 1, got 0"):
        encode(chat("hello", "the"), tokenizer, max_length=0)


USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "the"}


def write_lines(path, *lines) -> str:
    """Objects become JSON, strings and bytes go in as they are."""
    raw = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw))
    return path


def test_every_spelling_of_a_conversation_reads_the_same(tmp_path):
    parts = [{"type": "text", "text": "t"}, {"type": "text", "text": "he"}]
    chats = load_chats(
        write_lines(
            tmp_path / "mine.jsonl",
            b"\xef\xbb\xbf" + json.dumps({"messages": [USER, ASSISTANT], "id": "a"}).encode(),
            {"conversations": [USER, ASSISTANT], "id": 7, "domain": "math"},
            {
                "conversations": [
                    {"from": "human", "value": "hello"},
                    {"from": "gpt", "value": "the"},
                ]
            },
            {"prompt": "hello", "response": "the", "source": "anything"},
            {"messages": [USER, {"role": "assistant", "content": parts, "tool_calls": None}]},
            "",
            " \r",
        )
    )
    assert [c.messages for c in chats] == [(USER, ASSISTANT)] * 5
    assert [c.id for c in chats] == ["a", "7", "mine:3", "mine:4", "mine:5"]
    assert [c.domain for c in chats] == [None, "math", None, None, None]


def test_only_newlines_end_a_line(tmp_path):
    line = json.dumps({"prompt": "a\u2028b\u0085c", "response": ""}, ensure_ascii=False)
    (chat,) = load_chats(write_lines(tmp_path / "x.jsonl", line + "\r\n"))
    assert chat.messages[0]["content"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b'{"prompt": "\xff", "response": ""}', "not valid UTF-8: .* at byte 12"),
        ("", "blank line"),
        ([USER, ASSISTANT], "must be a JSON object, got a list"),
        ({"text": "hello"}, r"must have 'messages', .* got keys \['text'\]"),
        ({"prompt": "hello"}, "'prompt' and 'response'"),
        ({"prompt": "hello", "response": None}, "response must be a string, got null"),
        ({"messages": "hello"}, "messages must be a list, got a string"),
        ({"messages": []}, "at least one message"),
        ({"messages": [USER]}, "at least one of role 'assistant'"),
        ({"messages": [USER, "the"]}, r"messages\[1\] must be an object, got a string"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, r"messages\[0\] must have 'content'"),
        ({"messages": [{"content": "hello"}, ASSISTANT]}, r"messages\[0\] must have 'role'"),
        ({"messages": [{"role": "narrator", "content": ""}]}, "got 'narrator'"),
        ({"messages": [{"role": 3, "content": ""}]}, "role must be a string, got a number"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "got a number"),
        ({"messages": [USER, {"role": "assistant", "content": ["the"]}]}, "'text', got a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
            "'text', got 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "string, got null"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "'tool_calls'.* not supported"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "weight 0"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "'tools'.* not supported"),
        ({"messages": [USER, ASSISTANT], "conversations": []}, "only one is allowed"),
        ({"messages": [USER, ASSISTANT], "id": [1]}, "id must be a string or an integer"),
        ({"messages": [USER, ASSISTANT], "domain": 1}, "domain must be a string, got a number"),
        ({"messages": [USER, ASSISTANT], "id": "first"}, "'first' is already that of line 1"),
        ('{"prompt": "\\ud83c", "response": ""}', "surrogate"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_file_and_line(tmp_path, line, complaint):
    good = {"messages": [USER, ASSISTANT]}
    path = write_lines(tmp_path / "x.jsonl", good | {"id": "first"}, line, good)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_chats(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_a_file_without_conversations_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="x.jsonl: no conversations"):
        load_chats(write_lines(tmp_path / "x.jsonl", "", ""))
    with pytest.raises(FileNotFoundError):
        load_chats(tmp_path / "nowhere.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(OSError, match="loop.jsonl"):
        load_chats(tmp_path / "loop.jsonl")
    with pytest.raises(TypeError, match="path must be .*, got 5"):
        load_chats(5)


def test_a_chat_made_by_hand_is_checked_like_one_from_a_file():
    with pytest.raises(ValueError, match="role 'assistant'"):
        Chat((USER,), id="x")
    with pytest.raises(ValueError, match=r"messages\[1\] must have 'role' and 'content' alone"):
        Chat((USER, ASSISTANT | {"name": "Bo"}), id="x")
    with pytest.raises(TypeError, match="chat must be a Chat, got {"):
        encode({"messages": [USER, ASSISTANT]}, byte_level("words"))


def test_importing_chats_imports_neither_transformers_nor_pandas():
    code = "import sys, dspark_lab.chats.rows; print({'transformers', 'pandas'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_tokenizer_is_loaded_from_a_folder_and_checked(tmp_path):
    with_template(byte_level("words"), CHATML).save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(tmp_path / "good")
    encoded = encode(chat("hello", "the"), tokenizer)
    assert supervised_text(encoded, tokenizer) == "the<|im_end|>"
    with_template(byte_level("words"), None).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="chat template"):
        load_tokenizer(tmp_path / "bad")


def test_the_shipped_conversations_are_supervised_answer_by_answer():
    tokenizer = load_tokenizer()
    for chat in load_chats():
        encoded = encode(chat, tokenizer)
        ids = encoded.input_ids.tolist()
        pieces = write_chatml(chat.messages)
        if chat.messages[0]["role"] != "system":
            default = tokenizer.apply_chat_template([USER], tokenize=False).split("<|im_end|>\n")[0]
            pieces.insert(0, (default + "<|im_end|>\n", PROMPT))
        expected = expected_mask(tokenizer, ids, pieces)
        if not chat.finished:
            expected[max(index for index, here in enumerate(expected) if here)] = False
        assert encoded.loss_mask.tolist() == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama3 marked, end inside"])
def test_an_answer_that_was_cut_off_does_not_end_its_turn(name):
    tokenizer = with_template(byte_level("words"), TEMPLATES[name].jinja)
    whole = chat("hello", "is 42.", "world", "the 🎉")
    cut = Chat(whole.messages, id="cut", finished=False)
    end = supervised_text(encode(whole, tokenizer), tokenizer).removeprefix("is 42.")
    end = end[: end.index("the")]
    assert supervised_text(encode(cut, tokenizer), tokenizer) == f"is 42.{end}the 🎉"


def test_one_row_keeps_the_order_and_refuses_what_does_not_fit():
    encoded = numbered([3, 7, 2])
    batch = one_row(encoded, 14, pad_token_id=0)
    assert batch.input_ids.tolist() == [[*range(1, 13), 0, 0]]
    assert batch.chat_index.tolist() == [[0, 1, 2]] and batch.seq_lens.tolist() == [[3, 7, 2]]
    with pytest.raises(ValueError, match="12 tokens, got 11"):
        one_row(encoded, 11, pad_token_id=0)


def numbered(lengths: list[int], domains: list[str | None] | None = None) -> list[Encoded]:
    """Conversations whose tokens are all different; the last half of each is supervised."""
    items, first = [], 1
    for i, length in enumerate(lengths):
        made = Chat((USER, ASSISTANT), id=f"c{i}", domain=domains[i] if domains else None)
        ids = torch.arange(first, first + length)
        items.append(Encoded(ids, torch.arange(length) >= length // 2, made))
        first += length
    return items


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(12, 20))
def test_packing_keeps_every_conversation_whole_and_once(lengths, length):
    encoded = numbered(lengths)
    batch = pack(encoded, length=length, pad_token_id=0)
    seen = []
    for row in range(len(batch.input_ids)):
        start = 0
        for n, index in zip(batch.seq_lens[row].tolist(), batch.chat_index[row], strict=True):
            assert (n == 0) == (index == -1)
            if n:
                here = slice(start, start + n)
                assert batch.input_ids[row, here].equal(encoded[index].input_ids)
                assert batch.loss_mask[row, here].equal(encoded[index].loss_mask)
                seen.append(int(index))
                start += n
        assert batch.attention_mask[row].tolist() == [p < start for p in range(length)]
        assert batch.input_ids[row, start:].tolist() == [0] * (length - start)
        assert not batch.loss_mask[row, start:].any()
    assert sorted(seen) == list(range(len(encoded)))
    remaining, positions = oracle.packed_rows(batch.seq_lens.tolist(), length)
    assert batch.doc_remaining.tolist() == remaining
    assert batch.position_ids.tolist() == positions


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(12, 20))
def test_packing_is_first_fit_decreasing(lengths, length):
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= length:
                row.append(index)
                break
        else:
            rows.append([index])
    batch = pack(numbered(lengths), length=length, pad_token_id=0)
    assert [[i for i in row if i >= 0] for row in batch.chat_index.tolist()] == rows


def test_collating_is_packing_with_one_conversation_a_row():
    encoded = numbered([9, 8, 7])
    collated = collate(encoded, pad_token_id=3, length=10)
    packed = pack(encoded, length=10, pad_token_id=3)
    for name, tensor in vars(collated).items():
        assert tensor.equal(getattr(packed, name)) and tensor.dtype == getattr(packed, name).dtype


def test_collating_pads_on_the_right_to_the_longest_and_keeps_the_order():
    batch = collate(numbered([2, 3]), pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, True]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.doc_remaining.tolist() == [[1, 0, 0], [2, 1, 0]]
    assert batch.seq_lens.tolist() == [[2], [3]]
    assert batch.chat_index.tolist() == [[0], [1]]
    bools = {name for name, tensor in vars(batch).items() if tensor.dtype == torch.bool}
    assert bools == {"loss_mask", "attention_mask"}
    longs = {name for name, tensor in vars(batch).items() if tensor.dtype == torch.long}
    assert longs == set(vars(batch)) - bools


def test_a_batch_moves_with_all_its_tensors(device):
    batch = pack(numbered([2, 3]), length=4, pad_token_id=0).to(device)
    assert {tensor.device.type for tensor in vars(batch).values()} == {device.type}


@pytest.mark.parametrize("make", [collate, pack])
def test_a_conversation_longer_than_the_row_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"'c1' has 5 tokens, more than length 4; .*max_length=4"):
        make(numbered([2, 5]), length=4, pad_token_id=0)
    with pytest.raises(ValueError, match="encoded must not be empty"):
        make([], length=4, pad_token_id=0)
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        make(numbered([2]), length=0, pad_token_id=0)
    with pytest.raises(TypeError, match="pad_token_id must be an int, got None"):
        make(numbered([2]), length=4, pad_token_id=None)


def test_an_encoded_conversation_made_by_hand_must_fit_together():
    made = Chat((USER, ASSISTANT), id="odd")
    for ids, mask, match in ((3, 2, "must be .seq. with seq = 3"), (0, 0, "'odd' must hold a")):
        with pytest.raises(ValueError, match=match):
            Encoded(torch.zeros(ids).long(), torch.zeros(mask).bool(), made)


def test_describe_counts_each_domain():
    table = describe(numbered([4, 2, 6, 1], ["math", "code", "math", None]))
    assert table.index.tolist() == ["math", "code", "none"] and table.index.name == "domain"
    assert table.to_dict("list") == {
        "conversations": [2, 1, 1],
        "tokens": [10, 2, 1],
        "supervised_tokens": [5, 1, 1],
        "median_length": [5.0, 2.0, 1.0],
        "longest": [6, 2, 1],
        # One supervised token by itself is no anchor and has none.
        "without_labels": [0, 1, 1],
    }
