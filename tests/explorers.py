"""Explorers under test: how they are looked at, and a tokenizer whose tokens are words."""

import ipywidgets
import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dspark_lab
from dspark_lab import explore
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Chat, encode, one_row
from dspark_lab.explore import Explorer
from dspark_lab.explore.widget import WidgetView

WIDGET = "application/vnd.jupyter.widget-view+json"
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["!", "<b>", "$x$", *(f"w{i}" for i in range(60)), *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """One token a word; the words are numbered from 0, which is an exclamation mark."""
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"eos_token": "<|end|>", "chat_template": TEMPLATE} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def chat(words: int, name: str = "chat") -> Chat:
    """A question of two words and an answer of ``words``: seven tokens more than the answer."""
    said = " ".join(["<b>", "$x$", *(f"w{i % 60}" for i in range(words))][:words])
    messages = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": said})
    return Chat(messages, id=name)


TOKENIZER = make_tokenizer()
CHATS = [chat(20, "a"), chat(9, "b"), chat(90, "c")]
LENGTHS = [26, 15, 96]


def picture(explorer: Explorer) -> ipywidgets.HTML:
    """What is shown under the panel as HTML."""
    assert explorer.tables is not None
    *_, shown = explorer.children
    assert isinstance(shown, ipywidgets.HTML)
    return shown


def panel(explorer: Explorer) -> WidgetView:
    """The controls as a browser is given them."""
    shown = explorer.children[0]
    assert isinstance(shown, WidgetView)
    return shown


def edit(explorer: Explorer, **values: object) -> None:
    """Set controls as a browser does: all of them at once, coded as in the panel's state."""
    shown = panel(explorer)
    held = {control["name"]: control["value"] for control in shown.state["controls"]}
    turn = shown.state["turn"] + 1
    shown._handle_custom_msg({"action": "set", "turn": turn, "values": held | values}, [])


def alert(explorer: Explorer) -> str:
    """The sentence that stands beside the last picture."""
    assert explorer.tables == {}
    found = panel(explorer).state["problem"]
    assert found and "Traceback" not in found and "\n" not in found
    return found


def anchors(**start: object) -> Explorer:
    return explore.explore_anchors(CHATS, TOKENIZER, **start)


def masks(**start: object) -> Explorer:
    """With few anchors and tokens, for speed."""
    return explore.explore_masks(CHATS, TOKENIZER, **({"num_anchors": 2, "block_size": 3} | start))


def tables_by_hand(
    conversations: list[int], length: int, num_anchors: int, block_size: int, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """What both explorers' tables say for conversations in a row of ``length``."""
    encoded = [encode(CHATS[i], TOKENIZER) for i in conversations]
    batch = one_row(encoded, length, TOKENIZER.eos_token_id)
    blocks = draw_blocks(batch, num_anchors, block_size, seed=seed)

    def to_text(token_id: int) -> str:
        return str(TOKENIZER.decode([token_id]))

    return {
        "tokens": explore.token_table(batch, blocks, to_text),
        "blocks": explore.block_table(blocks, to_text),
        "mask": explore.mask_table(explore.mask_regions(blocks)),
    }


def follows(
    explorer: Explorer, name: str, value: object, expected: dict[str, pd.DataFrame]
) -> None:
    """Turn a control and compare all tables that are expected."""
    explorer.controls[name].value = value
    for table in set(explorer.tables) & set(expected):
        pd.testing.assert_frame_equal(explorer.tables[table], expected[table])


def require_same_view(explorer: Explorer, **given: object) -> None:
    """The explorer's code makes its view again, where names stand for the arguments ``given``."""
    names: dict = {"lab": dspark_lab, **given}
    code = explorer.code
    exec(code if code.startswith("explorer = ") else f"explorer = {code}", names)
    again = names["explorer"]
    assert again.code == code and again.settings == explorer.settings
    assert list(again.tables) == list(explorer.tables)
    for name, table in explorer.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)
    shown, same = explorer._frame.state, again._frame.state
    assert (shown is None) == (same is None)
