"""Rows and masks as other trainers make them, against plain programs for what they do."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.chats import (
    LIKE,
    Chat,
    Encoded,
    compare_masks,
    encode,
    encode_answers,
    load_chats,
    load_tokenizer,
)
from dspark_lab.explore import explore_anchors, explore_masks
from dspark_lab.tuning import Spans
from tests import templates
from tests.templates import said

SYSTEM = "You are a helpful assistant."
CHATML = templates.CHATML.replace("<|head|>", "<|im_start|>").replace("<|end|>", "<|im_end|>")
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
# An empty block of thinking before each answer that is the last; thinking is taken out of others.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m['reasoning_content'] | default('')) + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system message') }}{% endif %}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Closes the last turn with an end of text that the next message replaces.
CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
BACKWARDS = (
    "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A' }}{% endif %}"
)
BASE = load_tokenizer()


def tokenizer_of(template: str):
    BASE.chat_template = template
    return BASE


def talk(*turns: str, system: str | None = None) -> Chat:
    return Chat(said(*turns, system=system), "a")


def trainer_rows(chat, tokenizer, like, length=None, **options):
    """Tokens and mask of each row that a trainer makes of a conversation."""
    rows = encode(chat, tokenizer, length, like=like, **options)
    return [(row.input_ids, row.loss_mask) for row in (rows if like == "speculators" else [rows])]


def shown(row, tokenizer) -> str:
    """Each token as text, the supervised ones in brackets."""
    ids, mask = row
    tokens = [tokenizer.decode([token]) for token in ids.tolist()]
    pairs = zip(tokens, mask.tolist(), strict=True)
    return "".join(f"[{token}]" if mine else token for token, mine in pairs)


TWO = talk("Hi", "One.", "And?", "Two.")


ASKS, ANSWERS = "<|im_start|>user\n", "<|im_start|>assistant\n"
HI, AND = f"{ASKS}Hi<|im_end|>\n", f"{ASKS}And?<|im_end|>\n"
KIND = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
HEAD, END = "[<|im_start|>][ass][istant][\n]", "[<|im_end|>][\n]"
BLOCK = "[<][think][>][\n][\n][</][think][>][\n][\n]"
BOTH = f"{HI}{ANSWERS}[One][.]{END}{AND}{ANSWERS}[Two][.]{END}"
YES = talk("Hi", "Yes")
# The prompt opens a block of thinking that is empty, this answer has one that is not.
THOUGHT = Chat([*YES.messages[:1], YES.messages[1] | {"reasoning_content": "Hm"}], "a")
TOLD = {"function": {"name": "f", "arguments": json.dumps({"x": 1})}, "extra": 2}
FORM = '[{"id": "", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'
# Only answers are closed, and the user writes the header of one.
OPEN_TURNS = CHATML.replace(
    "m['content'] + '<|im_end|>\n'",
    "m['content'] + ('<|im_end|>' if m['role'] == 'assistant' else '') + '\n'",
)
# A trainer, a template, a conversation, options, and how its last row ends.
SHOWN = {
    "automodel supervises the role header and the line break": (
        "automodel", CHATML, TWO, {}, f"{HI}{HEAD}[One][.]{END}{AND}{HEAD}[Two][.]{END}"
    ),
    # The end of text that closes a rendering is counted, so each border is one token late.
    "automodel passes over an end of text": (
        "automodel", CLOSED, TWO, {},
        f"{ASKS}Hi\n<|im_start|>[ass][istant][\n][One][.][\n][<|im_start|>]"
        "user\nAnd?\n<|im_start|>[ass][istant][\n][Two][.][\n][<|im_end|>]",
    ),
    "deepspec puts a system message in front": ("deepspec", CHATML, TWO, {}, KIND + BOTH),
    "deepspec keeps one that is there": (
        "deepspec", CHATML, talk("Hi", "Yes", system="Be brief."), {},
        f"<|im_start|>system\nBe brief.<|im_end|>\n{HI}{ANSWERS}[Yes]{END}",
    ),
    "deepspec supervises an empty block of thinking": (
        "deepspec", THINKS, YES, {}, f"{BLOCK}[Yes]{END}"
    ),
    "an answer without its marker ends with the text but for a line break": (
        "deepspec", OPEN_TURNS, talk("Hi", "Yes", "<|im_start|>assistant\nfoo"), {},
        f"{ASKS}{ANSWERS}[foo]\n",
    ),
    # Its border is a number of tokens: two line breaks at the end of a text are one, here two.
    "specforge takes the empty block out again": (
        "specforge", THINKS, YES, {}, f"assistant\n<think>\n\n</think>\n[\n][Yes]{END}"
    ),
    "specforge keeps it with thinking": (
        "specforge", THINKS, YES, {"enable_thinking": True}, f"{BLOCK}[Yes]{END}"
    ),
    "specforge begins with the user": (
        "specforge", CHATML, Chat((TWO.messages[1], *TWO.messages), "a"), {}, KIND + BOTH
    ),
    "specforge ends where roles do not follow": (
        "specforge", CHATML, Chat((*TWO.messages[:2], TWO.messages[1]), "a"), {},
        f"{KIND}{HI}{ANSWERS}[One][.]{END}",
    ),
    "speculators makes a row for each answer": (
        "speculators", CHATML, TWO, {},
        f"{HI}{ANSWERS}One.<|im_end|>\n{AND}{ANSWERS}[Two][.]{END}",
    ),
    "speculators falls back to the common prefix": (
        "speculators", THINKS, THOUGHT, {"enable_thinking": False},
        f"<think>\n[H][m][\n][</][think][>][\n][\n][Yes]{END}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_trainer_makes_of_a_conversation(name):
    like, template, chat, options, end = SHOWN[name]
    rows = trainer_rows(chat, tokenizer_of(template), like, template_options=options)
    text = shown(rows[-1], BASE)
    assert text == end if end.startswith(("<|im_start|>s", HI)) else text.endswith(end)
    assert len(rows) == (len(chat.answers) if like == "speculators" else 1)


def test_tool_calls_reach_specforges_template_in_its_own_form():
    template = CHATML.replace(
        "m['content'] +", "m['content'] + (m['tool_calls'] | default([]) | tojson) +"
    )
    chat = Chat([YES.messages[0], YES.messages[1] | {"content": "", "tool_calls": [TOLD]}], "a")
    ids, mask = trainer_rows(chat, tokenizer_of(template), "specforge")[0]
    assert BASE.decode(ids[mask]) == FORM + "<|im_end|>\n"


def test_deepspec_passes_over_the_empty_thought_of_gemma4():
    tokenizer = tokenizer_of(GEMMA4)
    thought = "<|channel>thought\n<channel|>"
    for answer in ("Yes.", thought + "Yes."):
        ((ids, mask),) = trainer_rows(talk("Hi", answer), tokenizer, "deepspec")
        text = f"<|im_start|><|turn>user\nHi<turn|>\n<|turn>model\n{thought}Yes.<turn|>\n"
        assert tokenizer.decode(ids) == text
        first = len(tokenizer(text[: text.index("Yes.")], add_special_tokens=False)["input_ids"])
        assert mask.tolist() == [place >= first for place in range(len(ids))]


def test_specforge_knows_llama3_by_its_markers():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = LLAMA3
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    # The trainer would put a system message of its own in front, which is not known here.
    with pytest.raises(ValueError, match="'a': the trainer puts .*: give the conversation a"):
        encode(TWO, tokenizer, like="specforge")
    chat = talk("Hi", "One.", "And?", "Two.", system="Be kind.")
    ((ids, mask),) = trainer_rows(chat, tokenizer, "specforge")
    assert tokenizer.decode(ids).count("Be kind.") == 1
    # A text that ends with two line breaks has one token for both, one that goes on has two.
    assert tokenizer.decode(ids[mask]) == "\nOne.<|eot_id|>\nTwo.<|eot_id|>"


def test_speculators_drops_an_answer_whose_context_fills_the_limit():
    tokenizer = tokenizer_of(CHATML)
    first, _ = trainer_rows(TWO, tokenizer, "speculators")
    # Where the context alone fills the limit there is no row, and later ones may fit again.
    context = len(first[0]) - 4
    assert trainer_rows(TWO, tokenizer, "speculators", context) == []
    (cut,) = trainer_rows(TWO, tokenizer, "speculators", context + 1)
    assert cut[0].tolist() == first[0].tolist()[: context + 1] and cut[1].tolist()[-1]
    opening = Chat(({"role": "assistant", "content": "Hello"}, *TWO.messages), "a")
    assert len(trainer_rows(opening, tokenizer, "speculators")) == 2
    options = {"template_options": {"enable_thinking": False}}
    prompt = tokenizer_of(THINKS).apply_chat_template(
        THOUGHT.messages[:1], add_generation_prompt=True, enable_thinking=False
    )
    context = len(prompt["input_ids"])
    assert trainer_rows(THOUGHT, BASE, "speculators", context, **options) == []
    assert len(trainer_rows(THOUGHT, BASE, "speculators", context + 1, **options)) == 1


def test_automodel_sees_only_what_is_before_the_cut():
    assert len(trainer_rows(TWO, tokenizer_of(THINKS), "automodel", 8)[0][0]) == 8


def test_automodel_takes_the_mask_of_transformers_with_its_oddities():
    bare = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    tokenizer = tokenizer_of(bare)
    for answer in ("a", "hello 🎉", "é"):
        chat = Chat(({"role": "assistant", "content": answer}, TWO.messages[0]), "a")
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template(list(chat.messages), **options)
        ((ids, mask),) = trainer_rows(chat, tokenizer, "automodel")
        assert ids.tolist() == found["input_ids"]
        assert mask.tolist() == [flag == 1 for flag in found["assistant_masks"]]
    empty = Chat(({"role": "assistant", "content": ""}, TWO.messages[0]), "a")
    with pytest.raises(ValueError, match="automodel refuses an empty answer"):
        trainer_rows(empty, tokenizer, "automodel")
    # An answer within the first token has no end that is told from none.
    first = Chat(({"role": "assistant", "content": "a"}, TWO.messages[0]), "a")
    assert all(trainer_rows(first, tokenizer, "automodel")[0][1].tolist())


@pytest.mark.parametrize(
    ("like", "template", "chat", "reason"),
    [
        ("automodel", THINKS, TWO, "no prefix of the rendering of the whole"),
        ("speculators", BACKWARDS, YES, "speculators refuses .* history"),
        ("deepspec", LLAMA3, TWO, "deepspec has no markers .* qwen, gemma4"),
        ("deepspec", PLAIN, TWO, "no markers"),
        ("specforge", PLAIN, TWO, "specforge has no markers"),
        ("deepspec", GEMMA4, talk("Hi", "Yes", system="S"), "refuses it: no system message"),
        ("deepspec", CHATML, Chat(TWO.messages[1:], "a"), "the user to begin, got 'assistant'"),
        ("automodel", CHATML, Chat(TWO.messages[1:], "a"), "opens the conversation"),
        ("automodel", CHATML, talk("Hi"), "automodel needs an answer"),
    ],
)
def test_what_a_trainer_refuses_is_refused_by_name(like, template, chat, reason):
    with pytest.raises(ValueError, match=f"conversation 'a': .*{reason}"):
        encode(chat, tokenizer_of(template), like=like)


def test_settings_that_a_trainer_does_not_have_are_refused():
    for like in ("deepspec", "speculators"):
        with pytest.raises(ValueError, match=f"last_answer_only is no setting of {like}"):
            encode(TWO, tokenizer_of(CHATML), like=like, last_answer_only=True)
    with pytest.raises(ValueError, match="markers must be False"):
        encode(TWO, BASE, like="deepspec", markers=True)
    calls = partial(encode, TWO, BASE, like="automodel"), partial(compare_masks, [TWO], BASE)
    for call in calls:
        with pytest.raises(ValueError, match="reads no option 'thinks'"):
            call(template_options={"thinks": True})
    for like in ("automodel", "specforge"):
        row = encode(TWO, BASE, like=like, last_answer_only=True)
        assert "One" not in BASE.decode(row.input_ids[row.loss_mask])
        assert BASE.decode(row.input_ids[row.loss_mask]).endswith("Two.<|im_end|>\n")


def test_switches_of_the_loss_reach_no_trainer():
    for like in LIKE:
        cut = replace(TWO, finished=False, supervised=(True, False, True, True))
        rows = [trainer_rows(chat, tokenizer_of(CHATML), like) for chat in (TWO, cut)]
        for (ids, mask), (others, other_mask) in zip(*rows, strict=True):
            assert ids.equal(others) and mask.equal(other_mask)


texts = st.sampled_from(["hello", " the answer", "42.", "\n", "  ", "é", "🎉", "<|im_end|>", "a\n"])
contents = st.lists(texts, max_size=4).map("".join)


@st.composite
def chats(draw) -> Chat:
    turns = [draw(contents) for _ in range(draw(st.integers(1, 5)))]
    return talk(*turns, system=draw(st.none() | contents))


def by_pieces(chat: Chat, system: str) -> tuple[str, list[tuple[int, int]]]:
    """ChatML text written turn by turn, and the characters of the answers through the line break.

    By what a reader of the text sees: an answer begins behind a header and ends with the first end
    of turn and line break, or with the text, but for its last line break.
    """
    messages = list(chat.messages)
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    spans, place, header, end = [], 0, "<|im_start|>assistant\n", "<|im_end|>\n"
    while header in text[place:]:
        start = text.index(header, place) + len(header)
        place = text.index(end, start) + len(end)
        spans.append((start, place))
    return text, spans


@settings(max_examples=60)
@given(chats(), st.none() | st.integers(1, 40))
def test_markers_in_the_text_decide_for_deepspec_and_specforge(chat, length):
    tokenizer = tokenizer_of(CHATML)
    text, spans = by_pieces(chat, SYSTEM)

    def count(end: int) -> int:
        return len(tokenizer(text[:end], add_special_tokens=False)["input_ids"])

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = [False] * len(ids)
    for start, end in spans:
        for place in range(count(start), min(count(end), len(ids))):
            mask[place] = True
    for like in ("deepspec", "specforge"):
        row = encode(chat, tokenizer, length, like=like)
        assert row.input_ids.tolist() == ids[:length]
        assert row.loss_mask.tolist() == mask[:length]


@settings(max_examples=40)
@given(chats(), st.sampled_from([CHATML, MARKED]), st.none() | st.integers(1, 40))
def test_renderings_of_prefixes_decide_for_automodel(chat, template, length):
    tokenizer = tokenizer_of(template)
    messages = list(chat.messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if not chat.answers:
        return
    if template == MARKED:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [flag == 1 for flag in found["assistant_masks"]]
    else:
        mask = [False] * len(whole)
        for answer in chat.answers:
            ends = [
                len(
                    tokenizer.apply_chat_template(messages[:n], tokenize=True, return_dict=True)[
                        "input_ids"
                    ]
                )
                for n in (answer, answer + 1)
            ]
            for place in range(*ends):
                mask[place] = True
    row = encode(chat, tokenizer, length, like="automodel")
    assert row.input_ids.tolist() == whole[:length]
    assert row.loss_mask.tolist() == mask[:length]


@settings(max_examples=40)
@given(chats())
def test_what_lies_beyond_the_generation_prompt_decides_for_speculators(chat):
    tokenizer = tokenizer_of(CHATML)

    def ids(messages, **options) -> list[int]:
        options |= {"tokenize": True, "return_dict": True}
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]

    messages, expected = list(chat.messages), []
    for answer in chat.answers:
        prompt = ids(messages[:answer], add_generation_prompt=True)
        full = ids(messages[: answer + 1])
        border = 0
        while border < len(prompt) and prompt[border] == full[border]:
            border += 1
        expected.append((full, [place >= border for place in range(len(full))]))
    rows = encode(chat, tokenizer, like="speculators")
    assert [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows] == expected
    own = encode_answers(chat, tokenizer) if expected else []
    for row, one in zip(rows, own, strict=True):
        # The line break comes on top, and a token that joins the header's to the answer's own.
        assert row.loss_mask[-1] and not bool((one.loss_mask & ~row.loss_mask).any())
        assert int((row.loss_mask & ~one.loss_mask).sum()) <= 2


def test_the_anchors_on_screen_are_those_of_a_run_on_the_trainers_mask():
    tokenizer = tokenizer_of(CHATML)
    for like in LIKE:
        explorer = explore_anchors([TWO], tokenizer, like=like, num_anchors=3, seed=5)
        ids, mask = trainer_rows(TWO, tokenizer, like)[0]
        numbers = torch.rand(1, len(ids) - 1, generator=torch.Generator().manual_seed(5))[0]
        candidates = [p for p in range(len(ids) - 1) if mask[p] and mask[p + 1]]
        chosen = sorted(sorted(candidates, key=lambda p: float(numbers[p]))[:3])
        table = explorer.tables["tokens"]
        assert table["position"][table["anchor"]].tolist() == chosen
        assert table["token_id"].tolist() == ids.tolist()
        # Padding on the right, to whatever length, changes no anchor of a row.
        longer = torch.rand(1, 500, generator=torch.Generator().manual_seed(5))[0]
        assert longer[: len(ids) - 1].equal(numbers)


def test_a_trainers_row_is_shown_with_the_labs_own_mask_beside():
    tokenizer = tokenizer_of(CHATML)
    row = encode(TWO, tokenizer, like="automodel")
    for options in ({"chats": [row]}, {"chats": [TWO], "like": "automodel"}):
        explorer = explore_anchors(tokenizer=tokenizer, **options)
        supervised = explorer.tables["tokens"]["supervised"].tolist()
        assert supervised == row.loss_mask.tolist()
        own = explorer.tables["own"]["supervised"].tolist()
        assert own == encode(TWO, tokenizer).loss_mask.tolist() and own != supervised
    unknown = explore_anchors([Encoded(row.input_ids, row.loss_mask)], tokenizer)
    assert "own" not in unknown.tables and "own" not in explore_anchors([TWO], tokenizer).tables
    rows = explore_anchors([TWO, TWO], tokenizer, like="speculators", conversation=3)
    last = encode(TWO, tokenizer, like="speculators")[1]
    assert rows.tables["tokens"]["supervised"].tolist() == last.loss_mask.tolist()
    masks = explore_masks([TWO], tokenizer, like="deepspec", num_anchors=2)
    assert masks.tables["blocks"]["kept"].any()


def test_a_table_counts_what_a_trainer_supervises_and_the_model_never_says():
    tokenizer = tokenizer_of(CHATML)
    data = {"two": [TWO], "odd": [talk("Hi", "Yes"), Chat(TWO.messages[1:], "b")]}
    table = compare_masks(data, tokenizer).set_index(["data_set", "like"])
    # Of each answer: the header's four tokens and the line break, or the line break alone.
    assert table["only_supervised"].to_dict() == {
        **{("two", "automodel"): 10, ("two", "deepspec"): 2},
        **{("two", "specforge"): 2, ("two", "speculators"): 2},
        **{("odd", "automodel"): 5, ("odd", "deepspec"): 1},
        **{("odd", "specforge"): 2, ("odd", "speculators"): 2},
    }
    assert (table["only_generated"] == 0).all()
    assert table["refused"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert table["generated"]["two"].tolist() == [6] * 4
    assert table["rows"]["two"].tolist() == [1, 1, 1, 2]
    empty = compare_masks([talk("Hi", "Yes")], tokenizer_of(THINKS), "specforge").iloc[0]
    # The model has to say the empty block of thinking, which SpecForge leaves out.
    block = BASE.tokenize("<think>\n\n</think>\n\nYes")[:-2]
    assert empty["only_generated"] == len(block)
    cut = compare_masks([replace(TWO, finished=False)], tokenizer_of(CHATML), "speculators").iloc[0]
    assert cut["only_supervised"] == 3 and cut["generated"] == 5


def test_coverage_of_a_trainers_rows_is_of_its_mask():
    tokenizer = tokenizer_of(CHATML)
    shipped = load_chats().conversations[:10]
    for like in ("automodel", "deepspec"):
        rows = [encode(chat, tokenizer, like=like) for chat in shipped]
        assert Spans.of(rows).supervised == sum(int(row.loss_mask.sum()) for row in rows)
