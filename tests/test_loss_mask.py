"""Which tokens are supervised, under every way in which a chat template behaves."""

import pytest

from dspark_lab.chats import Chat, encode
from tests.templates import BEHAVIOURS, KINDS, Refused, mask_of, tokenizer

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
