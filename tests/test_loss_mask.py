"""Which tokens are supervised, under every way in which a chat template behaves."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dspark_lab.chats import Chat, Encoded, describe, encode, encode_answers
from tests.templates import (
    BEHAVIOURS,
    CHATML,
    KINDS,
    MARKERS,
    Behaviour,
    Refused,
    mask_of,
    said,
    sentencepiece,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:the chat template leaves out")
SPLITTINGS = ("words", "anything", "trimmed")


def check_mask(template, messages, tokenizer, finished=True):
    """The mask is that of the template written piece by piece, or both refuse."""
    chat = Chat(tuple(messages), "x", finished=finished)
    tokenizer.chat_template = template.jinja
    try:
        pieces = template.write(messages, finished)
    except Refused:
        with pytest.raises(ValueError, match="conversation 'x'"):
            encode(chat, tokenizer)
        return
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert "".join(text for text, _ in pieces) == text
    encoded = encode(chat, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    got, expected = encoded.loss_mask.tolist(), mask_of(pieces, tokens)
    both = zip(tokens, got, expected, strict=True)
    assert got == expected, [t if g == e else (t, g, e) for t, g, e in both]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_mask_is_what_the_model_generates(behaviour):
    for number, messages in enumerate(KINDS.values(), start=len(behaviour)):
        made = tokenizer(SPLITTINGS[number % 3], special=number % 2 == 0)
        check_mask(BEHAVIOURS[behaviour], messages, made, finished=number % 5 > 0)


fragments = st.sampled_from(
    [
        *MARKERS, "Hello", " there", "One.", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\r\n",
        "\x00", "🎉", "é", "e\u0301", "界", "👩\u200d👧", "\ue000", "\ue001", "Ġ", "assistant",
        "user: ", "<|head|>assistant\n", "<|en", "END", "{{ m }}", "{% generation %}",
        "<think>hm</think>",
    ]
)  # fmt: skip
contents = st.lists(fragments | st.text(max_size=3), max_size=5).map("".join)
roles = st.lists(st.sampled_from(["user", "assistant", "assistant", "tool"]), max_size=5)


@st.composite
def conversations(draw):
    order = draw(roles) + ["assistant"] + draw(st.sampled_from([[], ["user"]]))
    system = draw(st.sampled_from([[], ["system"]]))
    return [{"role": role, "content": draw(contents)} for role in system + order]


def check_random(behaviour, examples):
    @settings(deadline=None, derandomize=True, max_examples=examples)
    @given(conversations(), st.sampled_from(SPLITTINGS), st.booleans(), st.booleans())
    def check(messages, splitting, special, finished):
        check_mask(BEHAVIOURS[behaviour], messages, tokenizer(splitting, special), finished)

    check()


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_mask_of_random_conversations(behaviour):
    check_random(behaviour, 5)


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_mask_of_many_random_conversations(behaviour):
    check_random(behaviour, 60)


MARKED = CHATML.replace(
    "m['content'] + '<|end|>\n' }}",
    "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}",
)
THINKING = BEHAVIOURS["drops thinking, another marker"].jinja
THOUGHTS = said("Hi", "<think>hm</think>One.", "And?", "<think>so</think>Two.")


def of(jinja: str, special: bool = True):
    made = tokenizer("words", special)
    made.chat_template = jinja
    return made


def supervised(rows: Encoded | list[Encoded], made) -> list[str]:
    """The text of each supervised run of tokens."""
    runs = []
    for row in rows if isinstance(rows, list) else [rows]:
        before = False
        for token, here in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True):
            runs += [[]] if here and not before else []
            if here:
                runs[-1].append(token)
            before = here
    return [made.decode(run) for run in runs]


def test_the_mask_of_a_small_conversation_token_by_token():
    made = of(CHATML)
    chat = Chat(said("Hi", " Two.", "And?", " One."), "x")
    encoded = encode(chat, made)
    by_hand = (
        "<|head|> user Ċ H i <|end|> Ċ <|head|> assistant Ċ [ĠTwo] [.] [<|end|>] Ċ "
        "<|head|> user Ċ A n d ? <|end|> Ċ <|head|> assistant Ċ [ĠOne] [.] [<|end|>] Ċ"
    )
    tokens = made.convert_ids_to_tokens(encoded.input_ids)
    pairs = zip(tokens, encoded.loss_mask, strict=True)
    assert [f"[{token}]" if mine else token for token, mine in pairs] == by_hand.split()
    assert encoded.input_ids.dtype == torch.long and encoded.loss_mask.dtype == torch.bool
    written = made.apply_chat_template(list(chat.messages), tokenize=True, return_dict=True)
    assert encoded.input_ids.tolist() == written["input_ids"]
    for length in range(1, len(encoded) + 3):
        for part in (encode(chat, made, length), encode(encoded, made, length)):
            assert part.input_ids.tolist() == encoded.input_ids.tolist()[:length]
            assert part.loss_mask.tolist() == encoded.loss_mask.tolist()[:length]
            assert part.id == "x"


def test_a_row_for_each_answer_holds_it_as_it_was_generated():
    made = of(THINKING)
    chat = Chat(THOUGHTS, "x", domain="math")
    with pytest.warns(UserWarning, match="encode_answers"):
        whole = encode(chat, made)
    assert supervised(whole, made) == ["One.<|end|>", "<think>so</think>Two.<|stop|>"]
    assert whole.left_out == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = encode_answers(chat, made)
    assert supervised(rows, made) == [
        "<think>hm</think>One.<|stop|>",
        "<think>so</think>Two.<|stop|>",
    ]
    assert [(row.id, row.domain, row.left_out) for row in rows] == [("x", "math", 0)] * 2
    assert rows[1].input_ids.tolist() == whole.input_ids.tolist()
    assert rows[0].chat.messages == tuple(THOUGHTS[:2])
    assert len(encode_answers(chat, made, last_answer_only=True)) == 1
    assert [len(row) for row in encode_answers(chat, made, 5)] == [5, 5]
    part = Chat(THOUGHTS, "x", finished=False, supervised=[True, False, True, True])
    assert supervised(encode_answers(part, made), made) == ["<think>so</think>Two."]


def test_the_notice_comes_once_for_each_place_that_calls():
    made, chat = of(THINKING), Chat(THOUGHTS, "x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            encode(chat, made)
        encode(chat, made)
    assert [warning.filename for warning in caught] == [__file__] * 2
    encoded = [encode(chat, made), encode(Chat(THOUGHTS[:2], "y", "math"), made)]
    assert describe(encoded)["left_out"].to_dict() == {"none": 1, "math": 0}


def test_switches_leave_out_answers():
    made, messages = of(CHATML), said("Hi", "One.", "And?", "Two.")
    assert supervised(encode(Chat(messages, "x"), made, last_answer_only=True), made) == [
        "Two.<|end|>"
    ]
    for switches, kept in (("tfft", ["Two.<|end|>"]), ("tttf", ["One.<|end|>"]), ("tftf", [])):
        chat = Chat(messages, "x", supervised=[switch == "t" for switch in switches])
        assert supervised(encode(chat, made), made) == kept
        last = encode(chat, made, last_answer_only=True)
        assert supervised(last, made) == [text for text in kept if "Two" in text]
        assert supervised(encode_answers(chat, made), made) == kept


# A call closes with its own marker, its reasoning is gone once an answer follows, and the template
# refuses what a tool says without a call.
CALLS = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' and not loop.previtem.tool_calls -%}{{ raise_exception('no call') }}"
    "{%- endif -%}{{- '<|head|>' + m.role -}}"
    "{%- if m.reasoning_content and (loop.last or loop.nextitem.role == 'tool' and"
    " loop.index + 1 == messages | length) -%}"
    "{{- '<think>' + m.reasoning_content + '</think>' -}}{%- endif -%}"
    "{%- if m.tool_calls -%}{{- '<|role|>' + m.tool_calls[0].name + '<|stop|>' -}}"
    "{%- else -%}{{- '<|text|>' + m.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|head|>assistant' -}}{%- endif -%}"
)

# Thinking only of the last message, and calls as JSON.
FIELDS = CHATML.replace(
    "+ m['content']",
    "+ ('<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last else '')"
    " + m['content'] + (m.tool_calls | tojson if m.tool_calls else '')",
)
BLOCK = "('<think></think>' if loop.last and loop.index > 1 else '')"
OPENS = BEHAVIOURS["a prompt that no answer follows"].jinja
NO_PROMPT = "{% if add_generation_prompt and messages[-1].role != 'system' %}"
HM = {"role": "assistant", "content": "", "reasoning_content": "hm"}
CALL = HM | {"tool_calls": [{"name": "add"}]}
TOOL = {"role": "tool", "content": "2", "name": "add", "tool_call_id": "7"}
TOLD = [*said("Hi"), CALL, TOOL, {"role": "assistant", "content": "It is 2."}]
ONE, TWO = "One.<|end|>", "Two.<|end|>"
# A template, a conversation, what of it is supervised, how many answers history leaves out, and
# the first row of encode_answers where that holds more.
SMALL = {
    "an empty block that history lacks": (
        CHATML.replace("+ m['content']", f"+ {BLOCK} + m['content']"),
        said("Hi", "One.", "And?", "Two."), [ONE, f"<think></think>{TWO}"], 1,
        f"<think></think>{ONE}",
    ),
    "a marker of the prompt that begins a word": (
        OPENS, said("Hi", "<tool_call>", "And?", "Two."), ["<tool_call><|end|>", TWO]
    ),
    "a marker of the prompt and no words": (
        OPENS, said("Hi", "", "And?", "Two."), ["<|end|>", TWO]
    ),
    "words that the prompt begins": (
        OPENS, said("Hi", "<think>\nhm</think>One."), [f"hm</think>{ONE}"]
    ),
    "a head behind another answer": (
        BEHAVIOURS["another marker when last"].jinja,
        said("Hi", "One.", "assistant=Two."), [ONE, "Two.<|stop|>"], 0, "One.<|stop|>",
    ),
    "no prompt behind the system": (
        CHATML.replace("{% if add_generation_prompt %}", NO_PROMPT),
        said("assistant=One.", "And?", "Two.", system="Be kind."), [ONE, TWO],
    ),
    "an opening answer without the block of others": (
        CHATML.replace("+ m['content']", f"+ {BLOCK} + m['content']"),
        said("assistant=One.", "And?", "Two."), [ONE, f"<think></think>{TWO}"],
    ),
    "a prompt that is written unasked": (
        re.sub(r"{% if add.*? %}(.*){% endif %}", r"\1", CHATML, flags=re.DOTALL),
        said("Hi", "One.", "And?", "Two."), [ONE, TWO],
    ),
    "a prompt that is written unasked between answers": (
        re.sub(r"{% if add.*? %}(.*){% endif %}", r"\1", CHATML, flags=re.DOTALL),
        said("Hi", "One.", "assistant=Two."), [ONE, TWO],
    ),
    "calls that no placeholder stands for": (
        CALLS, TOLD, ["<|role|>add<|stop|>", "<|text|>It is 2.<|end|>"], 1,
        "<think>hm</think><|role|>add<|stop|>",
    ),
    "fields of a message": (
        FIELDS, [*TOLD[:-1], HM | {"content": "It is 2."}],
        ['[{"name": "add"}]<|end|>', "<think>hm</think>It is 2.<|end|>"], 1,
        '<think>hm</think>[{"name": "add"}]<|end|>',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_what_templates_do_at_the_edges_of_answers(name):
    jinja, messages, runs, left_out, first = (*SMALL[name], 0, None)[:5]
    made, chat = of(jinja), Chat(messages, "x")
    encoded = encode(chat, made)
    assert supervised(encoded, made) == runs and encoded.left_out == left_out
    assert supervised(encode_answers(chat, made), made)[0] == (first or runs[0])


# Messages of which the last answer was cut off, and what is supervised of it.
CUT_OFF = {
    "while it was thinking": (FIELDS, HM, "<think>hm"),
    "in its words": (FIELDS, HM | {"content": "One."}, "<think>hm</think>One."),
    "behind a call": (FIELDS, CALL, '<think>hm</think>[{"name": "add"}]'),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_an_answer_that_was_cut_off_closes_nothing_that_is_its_own(name):
    jinja, answer, run = CUT_OFF[name]
    chat = Chat([*said("Hi"), answer], "x", finished=False)
    assert supervised(encode(chat, of(jinja)), of(jinja)) == [run]


def test_an_answer_that_is_left_out_need_not_be_one_that_the_rule_can_place():
    messages = said("Hi", "<think>\rOne.", "And?", "Two.")
    with pytest.raises(ValueError, match=r"messages\[1\].*inside the answer"):
        encode(Chat(messages, "x"), of(OPENS))
    chat = Chat(messages, "x", supervised=[True, False, True, True])
    assert supervised(encode(chat, of(OPENS)), of(OPENS)) == [TWO]
    cut_off = Chat(messages, "x", finished=False, supervised=[True, True, True, False])
    assert supervised(encode(cut_off, of(CHATML)), of(CHATML)) == ["<think>\rOne.<|end|>"]


def test_options_reach_the_template_and_those_that_it_does_not_read_are_refused():
    made = of(
        CHATML.replace("assistant\n' }}", "assistant\n' + ('' if think else '<think></think>') }}")
    )
    chat = Chat(said("Hi", "<think></think>One."), "x")
    for think, text in ((True, "<think></think>One.<|end|>"), (False, "One.<|end|>")):
        options = {"template_options": {"think": think}}
        assert supervised(encode(chat, made, **options), made) == [text]
        assert supervised(encode_answers(chat, made, **options), made) == [text]
    for wrong in ("thinks", "add_generation_prompt", "tools"):
        with pytest.raises(ValueError, match=f"reads no option '{wrong}'"):
            encode(chat, made, template_options={wrong: True})


def test_markers_are_had_for_the_asking_and_their_differences_are_counted():
    made, chat = of(MARKED), Chat(said("Hi", "One. 🎉", "And?", "Two."), "x", "math")
    ruled, marked = encode(chat, made), encode(chat, made, markers=True)
    assert supervised(ruled, made) == ["One. 🎉<|end|>", "Two.<|end|>"]
    assert supervised(marked, made) == ["One. 🎉", "Two."]
    assert ruled.marker_differences == marked.marker_differences == 2
    assert encode(chat, made, max_length=20).marker_differences < 2
    assert describe([ruled, ruled])["marker_differences"].to_dict() == {"math": 4}
    assert encode(chat, of(CHATML)).marker_differences == 0
    cut_off = Chat(chat.messages, "x", finished=False)
    inside = of(MARKED.replace("{% endgeneration %}", "{{ '<|end|>' }}{% endgeneration %}"))
    for made, last in ((of(MARKED), "Two."), (inside, "Two.")):
        assert supervised(encode(cut_off, made, markers=True), made)[-1] == last
    made = of(MARKED)
    only = Chat(chat.messages, "x", supervised=[True, True, True, False])
    assert supervised(encode(only, made, markers=True), made) == ["One. 🎉"]
    assert supervised(encode(chat, made, markers=True, last_answer_only=True), made) == ["Two."]
    with pytest.raises(ValueError, match="'x'.*are none in the chat template"):
        encode(chat, of(CHATML), markers=True)
    with pytest.raises(ValueError, match="'x'.*enclose nothing"):
        encode(chat, of(MARKED.replace("== 'assistant'", "== 'nobody'")), markers=True)


@pytest.mark.parametrize("tag", ["{%- generation %}", "{%generation-%}", "{% generation -%}"])
def test_every_way_to_write_the_markers_is_read(tag):
    made = of(
        MARKED.replace("{% generation %}", tag).replace(
            "m.content }}{% endg", "m.content | reverse }}{% endg"
        )
    )
    encoded = encode(Chat(said("Hi", "abc"), "x"), made, markers=True)
    assert supervised(encoded, made) == ["cba"]


def test_a_conversation_without_an_answer_says_so():
    for call in (encode, encode_answers):
        with pytest.raises(ValueError, match="conversation 'x'.* no answer"):
            call(Chat(said("Hi"), "x"), of(CHATML))


ANSWER = {"role": "assistant", "content": "One."}
REFUSALS = {
    "a message of the system": (
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
        Chat(said("Hi", "One.", system="Be kind."), "x"),
        r"messages\[0\] of role 'system'",
    ),
    "one whose words stand elsewhere": (
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
        Chat(said("Hi", "One.", system="Hi"), "x"),
        r"messages\[0\] of role 'system'",
    ),
    "a message of the user": (
        CHATML.replace("m['content']", "('' if m.role == 'user' else m['content'])"),
        Chat(said("Hi", "One."), "x"),
        r"messages\[0\] of role 'user'",
    ),
    "a tool's words": (
        CHATML.replace("m['content']", "('done' if m.role == 'tool' else m['content'])"),
        Chat(said("Hi", "Wait.", "tool=42", "assistant=It is 42."), "x"),
        r"messages\[2\] of role 'tool'",
    ),
    "an answer": (
        CHATML.replace("m['content']", "('Yes.' if m.role == 'assistant' else m['content'])"),
        Chat(said("Hi", "One."), "x"),
        r"answer in messages\[1\]",
    ),
    "an answer's words beside its calls": (
        CHATML.replace("m['content']", "(m.tool_calls | tojson if m.tool_calls else m['content'])"),
        Chat([*said("Hi"), ANSWER | {"tool_calls": [{"name": "add"}]}], "x"),
        r"answer in messages\[1\]",
    ),
    "tools": (CHATML, Chat(said("Hi", "One."), "x", tools=[{"name": "add"}]), r"tools\[0\]"),
    "the second tool": (
        CHATML + "{{ tools[0] if tools else '' }}",
        Chat(said("Hi", "One."), "x", tools=[{"name": "add"}, {"name": "sub"}]),
        r"tools\[1\]",
    ),
    "reasoning": (
        CHATML,
        Chat([{"role": "user", "content": "Hi"}, ANSWER | {"reasoning_content": "hm"}], "x"),
        r"messages\[1\] has 'reasoning_content'",
    ),
    "tool calls": (CHATML, Chat([ANSWER | {"tool_calls": [{"name": "add"}]}], "x"), "'tool_calls'"),
    "the second tool call": (
        CHATML.replace("m['content']", "m['content'] ~ (m.tool_calls or [''])[0]"),
        Chat([ANSWER | {"tool_calls": [{"name": "add"}, {"name": "sub"}]}], "x"),
        r"'tool_calls\[1\]'",
    ),
    "an unknown switch": (CHATML, Chat([ANSWER | {"train_on": False}], "x"), "'train_on'"),
    "what the template refuses": (
        CHATML.replace("+ '<|end|>", "+ raise_exception('no thanks') + '<|end|>"),
        Chat(said("Hi", "One."), "x"),
        "template refuses it: no thanks",
    ),
    "a template that fails": (
        CHATML.replace("+ '<|end|>", "+ 5 + '<|end|>"), Chat(said("Hi", "One."), "x"), "refuses it"
    ),
    "a prompt that counts the messages": (
        CHATML.replace("m['role'] +", "m['role'] ~ loop.index +").replace(
            "<|head|>assistant\n", "<|head|>assistant' ~ (messages|length + 1) ~ '\n"
        ),
        Chat(said("assistant=One.", "And?", "Two."), "x"),
        "beyond recognition",
    ),
    "turns in reverse": (
        CHATML.replace("in messages", "in messages | reverse"),
        Chat(said("Hi", "One.", "And?", "Two."), "x"),
        "inside the answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_vanish_is_refused_by_name(name):
    jinja, chat, complaint = REFUSALS[name]
    with pytest.raises(ValueError, match=f"conversation 'x': .*{complaint}"):
        encode(chat, of(jinja))


def test_special_tokens_that_swallow_the_space_beside_them_are_found():
    """The header takes the space behind it, "<|close|>" that on both sides."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer("words", True).backend_tokenizer.to_str()),
        chat_template=CHATML.replace("head", "open").replace("<|end", "<|close"),
    )
    header = AddedToken("<|open|>", rstrip=True, special=True)
    made.add_tokens([header, AddedToken("<|close|>", lstrip=True, rstrip=True, special=True)])
    encoded = encode(Chat(said("Hi", "One. \n", "", "\n", " ", ""), "x"), made)
    assert supervised(encoded, made) == ["One.<|close|>", "<|close|>", "<|close|>"]


def test_sentencepiece_tokenizers():
    made = sentencepiece()
    made.chat_template = BEHAVIOURS["a space before the answer"].jinja
    encoded = encode(Chat(said("hello", "answer is 🎉"), "x"), made)
    tokens = made.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
    assert "".join(tokens) == "▁▁answer▁is▁<0xF0><0x9F><0x8E><0x89><|end|>"


def test_tokenizers_that_drop_white_space_and_have_unknown_words():
    words = ["<unk>", "</s>", "user", "assistant", ":", "hello", "the", "answer"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    for close, last in (("</s>", ["</s>"]), ("", []), ("§", ["<unk>"])):
        made.chat_template = Behaviour(head="{role}: ", close=close, gap="\n\n").jinja
        encoded = encode(Chat(said("hello", "the\nanswer"), "x"), made)
        tokens = made.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
        assert tokens == ["the", "answer", *last]


def test_slow_tokenizers_and_tokenizers_without_a_template_are_refused():
    chat = Chat(said("Hi", "One."), "x")
    with pytest.raises(ValueError, match="fast.*ByT5Tokenizer"):
        encode(chat, ByT5Tokenizer())
    with pytest.raises(ValueError, match="chat template"):
        encode(chat, of(None))
