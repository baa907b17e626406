"""`dspark_lab.chats`: reading, which tokens are the assistant's, padding and packing.

Each chat template stands here twice: as the Jinja text that tokenizers ship, and as a Python
function that writes the same conversation piece by piece and says of each piece whose it is. The
tokens are laid over the pieces by their bytes, not by a tokenizer's offsets.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
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
from tests.samples import documents

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
LLAMA3_MARKED = LLAMA3.replace(
    "m['content'] | trim + '<|eot_id|>' }}",
    "'' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}",
)
CHATML_MARKED = CHATML.replace(
    "{{ m['content'] }}",
    "{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}",
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
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


def writer(header: str, end: str, between: str = "", first: str = "", strip: bool = False):
    """Each turn is a header, then what was said and its end; ``first`` opens the conversation."""

    def write(messages) -> Pieces:
        pieces = [(first, PROMPT)]
        for m in messages:
            role, said = m["role"], m["content"].strip() if strip else m["content"]
            pieces += [(header.format(role=role, Role=role.capitalize()), PROMPT)]
            pieces += [(said + end, ANSWER if role == "assistant" else PROMPT), (between, PROMPT)]
        return pieces

    return write


write_chatml = writer("<|im_start|>{role}\n", "<|im_end|>", "\n")
write_llama3 = writer(
    "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", first="<s>", strip=True
)


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


# Each template, and who writes the same.
TEMPLATES: dict[str, tuple[str, Callable[[list], Pieces]]] = {
    "chatml": (CHATML, write_chatml),
    "chatml marked, end outside": (CHATML_MARKED, write_chatml),
    "llama3": (LLAMA3, write_llama3),
    "llama3 marked, end inside": (LLAMA3_MARKED, write_llama3),
    "zephyr": (ZEPHYR, writer("<|{role}|>\n", "</s>", "\n")),
    "plain": (PLAIN, writer("{Role}: ", "", "\n\n")),
    "llama2": (LLAMA2, write_llama2),
    "qwen3": (QWEN3, write_qwen3),
}

SPECIAL = (
    "<unk> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<|user|> <|assistant|> <|system|>"
).split()
CORPUS = [
    "user assistant system hello world, the answer is 42.",
    "User: hello\n\nAssistant: the answer\n\n \n  world",
    "hello   world    the \n\n\n answer",
    "assistant\nhello assistant\n\nthe [INST] hello [/INST] the answer </think>\n\nhello",
] * 8
# Ways in which real byte-level tokenizers differ: words split by GPT-2's pattern or not at all
# (then a newline joins the word behind it), and offsets that leave a word's space out.
SPLITTING = {"words": (True, None), "anything": (False, None), "trimmed": (True, True)}


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def byte_level(splitting: str) -> PreTrainedTokenizerFast:
    use_regex, trim = SPLITTING[splitting]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    if trim is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return fast(backend)


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


def test_the_mask_of_a_small_conversation_token_by_token_whole_and_cut_off():
    tokenizer = with_template(byte_level("words"), CHATML)
    small = chat("hello", "the answer", "is", "42.")
    encoded = encode(small, tokenizer)
    by_hand = (
        "<|im_start|> user Ċ hello <|im_end|> Ċ <|im_start|> assistant Ċ [the] [Ġanswer] "
        "[<|im_end|>] Ċ <|im_start|> user Ċ is <|im_end|> Ċ <|im_start|> assistant Ċ [42] [.] "
        "[<|im_end|>] Ċ"
    )
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    pairs = zip(tokens, encoded.loss_mask, strict=True)
    assert [f"[{token}]" if mine else token for token, mine in pairs] == by_hand.split()
    assert encoded.input_ids.dtype == torch.long and encoded.loss_mask.dtype == torch.bool
    for length in range(1, len(encoded) + 3):
        part = encode(small, tokenizer, max_length=length)
        assert part.input_ids.tolist() == encoded.input_ids.tolist()[:length]
        assert part.loss_mask.tolist() == encoded.loss_mask.tolist()[:length]


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
    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(conversations(thinking=name == "qwen3"), st.sampled_from(sorted(SPLITTING)))
    @example([{"role": "assistant", "content": ""}], "words")
    @example([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}] * 2, "words")
    def check(messages, splitting):
        jinja, write = TEMPLATES[name]
        tokenizer, pieces = with_template(byte_level(splitting), jinja), write(messages)
        encoded = encode(Chat(tuple(messages), id="random"), tokenizer)
        ids = encoded.input_ids.tolist()
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert ids == rendered["input_ids"]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(
            text for text, _ in pieces
        )
        assert encoded.loss_mask.tolist() == expected_mask(tokenizer, ids, pieces)

    check()


ENDED = "'<|head|>\n' + m['content'] + '<|end|>\n'"


@pytest.mark.parametrize(
    ("rstrip", "turn", "answers", "expected"),
    [
        (True, ENDED, ["the \n", "\n", ""], "the<|end|><|end|><|end|>"),
        (False, ENDED, ["the \n", "\n", ""], "the<|end|><|end|><|end|>"),
        (True, "'<|head|>' + m['content'] + '\n</s>'", [""], "</s>"),
    ],
)
def test_special_tokens_that_swallow_the_space_beside_them_are_found(
    rstrip, turn, answers, expected
):
    """The header takes the space behind it, "<|end|>" that before it."""
    backend = Tokenizer.from_str(byte_level("words").backend_tokenizer.to_str())
    header = AddedToken("<|head|>", rstrip=rstrip, special=True)
    backend.add_special_tokens([header, AddedToken("<|end|>", lstrip=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    said = [text for answer in answers for text in ("is", answer)]
    assert supervised_text(encode(chat(*said), tokenizer), tokenizer) == expected


def test_sentencepiece_tokenizers_and_llama2():
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["hello answer answer is"] * 9, trainer)
    tokenizer = with_template(fast(backend), LLAMA2)
    encoded = encode(chat("hello", "answer is 🎉"), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
    assert "".join(pieces) == "▁answer▁is▁<0xF0><0x9F><0x8E><0x89>▁</s>"


def test_tokenizers_that_drop_white_space_and_have_unknown_words():
    words = ["<unk>", "</s>", "User", "Assistant", ":", "hello", "the", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = fast(backend)
    for end, supervised in (("eos_token + '\n'", ["</s>"]), ("'§ '", [])):
        tokenizer.chat_template = PLAIN.replace("'\n\n'", end)
        encoded = encode(chat("hello", "the\nanswer"), tokenizer)
        found = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
        assert found == ["the", "answer", *supervised]


NO_PROMPT = CHATML.split("{% if add")[0]
COUNTED = "m['content'] | length ~ m['content'] | upper }}"
# The reversed answer can be found by its markers alone.
REVERSED = CHATML_MARKED.replace("m['content'] }}{%- endg", "m['content'] | reverse }}{%- endg")
THOUGHT = "<think>\nhm\n</think>\n\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
END, FOUR = "<|im_end|>", ["hello", "the", "is", "42"]
UPPER = "m['content'] | upper }}"
# A template, the turns, and what of their text is supervised.
SUPERVISED = {
    "the first word behind the template's space": (LLAMA2, ["hello", "answer"], " answer </s>"),
    "an empty answer's end of turn": (CHATML, ["hello", ""] * 2, END + END),
    "no token that joins the prompt to the answer": (CHATML, ["hello", "\n\nthe"], f"\nthe{END}"),
    "the end of turn of an answer that spells one": (CHATML, ["", "the" + END], f"the{END}{END}"),
    "the same with markers": (CHATML_MARKED, ["", "the" + END], f"the{END}{END}"),
    "not the next turn's header": (CHATML.replace(END + "\n", "\n"), FOUR, "the42"),
    "nor its start of sequence": (
        CHATML.replace(END + "\n", "").replace("<|im_start|>", "<s>"), FOUR, "the42"
    ),
    "a last character of several tokens": (CHATML_MARKED, ["hello", "the 🎉"], f"the 🎉{END}"),
    **{
        f"what the markers enclose as {marker}": (
            REVERSED.replace("{%- generation -%}", marker), ["hello", "abc"], f"cba{END}"
        )
        for marker in ("{%- generation %}", "{%generation-%}", "{% generation -%}")
    },
    **{
        f"an answer that the template changes in place, {name}": (
            jinja.replace("m['content'] }}", UPPER), ["", "abc", "", "d"], f"ABC{END}D{END}"
        )
        for name, jinja in (("with a prompt", CHATML), ("without", NO_PROMPT))
    },
    "all behind the prompt where an answer is beyond recognition": (
        CHATML.replace("m['content'] }}", COUNTED), ["hello", "answer"], f"6ANSWER{END}"
    ),
    "thoughts in the last turn, gone from earlier ones": (
        QWEN3, ["", THOUGHT + "a", "", THOUGHT + "b"], f"a{END}{THOUGHT}b{END}"
    ),
    "thoughts that the template lays out anew": (
        QWEN3, ["hello", "<think>hm</think>a"], f"{THOUGHT}a{END}"
    ),
    "not the template's own empty thoughts": (QWEN3, ["hello", "a"], "a" + END),
    "nor those before white space": (QWEN3, ["", "\na", "", "\n\nb"], f"\na{END}b{END}"),
    "an answer's own empty thoughts": (
        QWEN3, ["hello", EMPTY_THOUGHT + "a"], f"{EMPTY_THOUGHT}a{END}"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jinja", "turns", "expected"), SUPERVISED.values(), ids=SUPERVISED)
def test_what_is_supervised(jinja, turns, expected):
    tokenizer = with_template(byte_level("words"), jinja)
    assert supervised_text(encode(chat(*turns), tokenizer), tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "old", "new", "complaint"),
    [
        (CHATML, "m['content'] }}", "m['content'] if loop.last else '' }}", "every answer once"),
        (CHATML, "m['content'] }}", "m['content'] + m['content'] }}", "every answer once"),
        (CHATML, "in messages", "in messages | reverse", "every answer once"),
        (CHATML, "'<|im_end|>\n'", "m['content'] | length", r"messages\[3\].*generation"),
        (CHATML, "{{ m['content'] }}", "{{ raise_exception('no thanks') }}", "refuses.*no thanks"),
        (NO_PROMPT, "m['content'] }}", COUNTED, r"messages\[3\].*generation"),
        (CHATML_MARKED, "== 'assistant'", "== 'nobody'", "enclose nothing"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused_by_name(template, old, new, complaint):
    tokenizer = with_template(byte_level("words"), template.replace(old, new))
    with pytest.raises(ValueError, match=f"conversation 'test': .*{complaint}"):
        encode(chat("hello", "the", "hello", "answer"), tokenizer)


def test_slow_tokenizers_and_tokenizers_without_a_template_are_refused():
    with pytest.raises(ValueError, match="fast.*ByT5Tokenizer"):
        encode(chat("hello", "the"), ByT5Tokenizer())
    with pytest.raises(ValueError, match="chat template"):
        encode(chat("hello", "the"), with_template(byte_level("words"), None))


USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "the"}


def write_lines(path, *lines) -> str:
    """Objects become JSON, strings and bytes go in as they are."""
    raw = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw))
    return path


def test_every_spelling_of_a_conversation_reads_the_same(tmp_path):
    parts = [{"type": "text", "text": "t"}, {"type": "text", "text": "he"}]
    sharegpt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the"}]
    chats = load_chats(
        write_lines(
            tmp_path / "mine.jsonl",
            b"\xef\xbb\xbf" + json.dumps({"messages": [USER, ASSISTANT], "id": "a"}).encode(),
            {"conversations": [USER, ASSISTANT], "id": 7, "domain": "math"},
            {"conversations": sharegpt},
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
        ({"prompt": "hello", "response": None}, "response must be a string, got null"),
        ({"messages": "hello"}, "messages must be a list, got a string"),
        ({"messages": []}, "at least one message"),
        ({"messages": [USER]}, "at least one of role 'assistant'"),
        ({"messages": [USER, "the"]}, r"messages\[1\] must be an object, got a string"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, r"messages\[0\] must have 'content'"),
        ({"messages": [{"role": "narrator", "content": ""}]}, "got 'narrator'"),
        ({"messages": [{"role": 3, "content": ""}]}, "role must be a string, got a number"),
        ({"messages": [USER, {"role": "assistant", "content": ["the"]}]}, "'text', got a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "got 'image_url'"),
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


def test_a_chat_made_by_hand_is_checked_like_one_from_a_file_and_holds_a_token():
    with pytest.raises(ValueError, match="role 'assistant'"):
        Chat((USER,), id="x")
    with pytest.raises(ValueError, match=r"messages\[1\] must have 'role' and 'content' alone"):
        Chat((USER, ASSISTANT | {"name": "Bo"}), id="x")
    with pytest.raises(ValueError, match="'odd' must hold a token"):
        Encoded(torch.zeros(0).long(), torch.zeros(0).bool(), Chat((USER, ASSISTANT), id="odd"))


def test_a_tokenizer_is_loaded_from_a_folder(tmp_path):
    with_template(byte_level("words"), CHATML).save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(tmp_path / "good")
    encoded = encode(chat("hello", "the"), tokenizer)
    assert supervised_text(encoded, tokenizer) == "the<|im_end|>"


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
    tokenizer = with_template(byte_level("words"), TEMPLATES[name][0])
    end = "<|im_end|>" if name == "chatml" else "<|eot_id|>"
    for finished, last in ((True, end), (False, "")):
        made = Chat(chat("hello", "is 42.", "world", "the 🎉").messages, "x", finished=finished)
        assert supervised_text(encode(made, tokenizer), tokenizer) == f"is 42.{end}the 🎉{last}"


PAD = 1000


def test_one_row_keeps_the_order_and_no_row_takes_what_does_not_fit():
    encoded = documents("aaa", "a" * 7, "aa")
    batch = one_row(encoded, 14, pad_token_id=0)
    assert batch.input_ids.tolist() == [[*range(12), 0, 0]]
    assert batch.chat_index.tolist() == [[0, 1, 2]] and batch.seq_lens.tolist() == [[3, 7, 2]]
    with pytest.raises(ValueError, match="12 tokens, got 11"):
        one_row(encoded, 11, pad_token_id=0)
    match = "'hand-made' has 5 tokens, more than length 4; .*max_length=4"
    for make in (collate, pack):
        with pytest.raises(ValueError, match=match):
            make(documents("aa", "aaaaa"), length=4, pad_token_id=PAD)


@given(st.lists(st.text("a.", min_size=1, max_size=12), min_size=1), st.integers(12, 20))
def test_packing_keeps_every_conversation_whole_and_once_by_first_fit_decreasing(marks, length):
    encoded = documents(*marks)
    batch = pack(encoded, length, PAD)
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
        assert batch.input_ids[row, start:].tolist() == [PAD] * (length - start)
        assert not batch.loss_mask[row, start:].any()
    assert sorted(seen) == list(range(len(encoded)))
    remaining, positions = oracle.packed_rows(batch.seq_lens.tolist(), length)
    assert batch.doc_remaining.tolist() == remaining
    assert batch.position_ids.tolist() == positions
    rows: list[list[int]] = []
    for index in sorted(range(len(marks)), key=lambda i: (-len(marks[i]), i)):
        for row in rows:
            if sum(len(marks[i]) for i in row) + len(marks[index]) <= length:
                row.append(index)
                break
        else:
            rows.append([index])
    assert [[i for i in row if i >= 0] for row in batch.chat_index.tolist()] == rows


def test_collating_pads_on_the_right_to_the_longest_and_keeps_the_order():
    batch = collate(documents(".a", ".aa"), PAD)
    assert batch.input_ids.tolist() == [[0, 1, PAD], [2, 3, 4]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, True]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.doc_remaining.tolist() == [[1, 0, 0], [2, 1, 0]]
    assert batch.seq_lens.tolist() == [[2], [3]]
    assert batch.chat_index.tolist() == [[0], [1]]
    assert all(t.dtype in (torch.bool, torch.long) for t in vars(batch).values())


def test_a_batch_moves_with_all_its_tensors():
    batch = pack(documents("aa", "aaa"), 4, PAD).to("meta")
    assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


def test_describe_counts_each_domain():
    domains, marks = ["math", "code", "math", None], ["..aa", ".a", "...aaa", "a"]
    encoded = [
        replace(item, chat=replace(item.chat, domain=domain))
        for item, domain in zip(documents(*marks), domains, strict=True)
    ]
    table = describe(encoded)
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
