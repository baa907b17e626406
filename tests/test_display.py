"""Tokens as text: the bytes of a character are joined, and shown once."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dspark_lab.chats import TokenText, load_tokenizer, token_texts
from tests.templates import sentencepiece


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte by byte, but for a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello hello"], trainer)
    backend.add_special_tokens(["<|end|>", "Ġ界"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def texts(text: str, tokenizer=None) -> list[str]:
    tokenizer = tokenizer or byte_level()
    return TokenText(tokenizer).of(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_character_is_shown_with_its_last_token_and_its_other_bytes_as_hexadecimal():
    assert texts("é") == ["<0xC3>", "é"]
    assert texts("a🎉b") == ["a", "<0xF0>", "<0x9F>", "<0x8E>", "🎉", "b"]
    assert texts("<|end|>Ġ界") == ["<|end|>", "Ġ界"]
    shipped = load_tokenizer()
    found = texts("Grüße 🎉 日本語", shipped)
    assert [text for text in found if "<0x" not in text] == [
        "Gr",
        "ü",
        "ß",
        "e",
        "🎉",
        "日",
        "本",
        "語",
    ]
    assert "\ufffd" not in "".join(found)


def test_bytes_that_complete_no_character_stay_hexadecimal():
    show, made = TokenText(byte_level()), byte_level()
    party = made("🎉", add_special_tokens=False)["input_ids"]
    hello = made("e", add_special_tokens=False)["input_ids"]
    assert show.of(party[:2] + hello) == ["<0xF0>", "<0x9F>", "e"]
    assert show.of(party[1:] + hello) == ["<0x9F>", "<0x8E>", "<0x89>", "e"]
    assert show.of(party[:1] + party) == ["<0xF0>", "<0xF0>", "<0x9F>", "<0x8E>", "🎉"]
    assert [show(token) for token in party] == ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
    assert token_texts(show, party) == show.of(party)
    assert token_texts("{} ".format, [1, 2]) == ["1 ", "2 "]


@pytest.mark.parametrize("make", [byte_level, load_tokenizer])
def test_every_character_is_shown_once(make):
    tokenizer = cache(make)()
    show = TokenText(tokenizer)

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(st.text(st.characters(exclude_characters="<", exclude_categories=["C"]), max_size=12))
    def check(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        shown = show.of(ids)
        assert len(shown) == len(ids)
        # The text of the tokens, without their hexadecimal bytes.
        assert "".join(part.split("<0x")[0] for part in shown) == text

    check()


def test_sentencepiece_shows_spaces_and_bytes():
    made = sentencepiece()
    ids = made("hello é", add_special_tokens=False)["input_ids"]
    assert "".join(TokenText(made).of(ids)) == " hello <0xC3>é"


def test_a_tokenizer_without_a_decoder_shows_what_it_decodes():
    backend = Tokenizer(models.WordLevel({"hello": 0, "<unk>": 1}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert texts("hello § hello", made) == ["hello", "<unk>", "hello"]
