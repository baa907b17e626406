"""Ways in which chat templates behave, each as Jinja text and as a loop that a reader believes.

A loop writes a conversation piece by piece and says of each piece whether the model generates it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# A text, and the number of the answer that it is generated for; None where nobody generates it.
Piece = tuple[str, int | None]
MARKERS = (
    "<|head|> <|user|> <|assistant|> <|system|> <|tool|> <|end|> <|stop|> <|text|> <|role|> "
    "<think> </think> <s> </s> <unk>"
).split()
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}
MARKER = re.compile("|".join(map(re.escape, MARKERS)))


CHATML = (
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}"
)


class Refused(Exception):
    """The template, or the rule, refuses the conversation."""


@dataclass(frozen=True)
class Behaviour:
    """What a template writes of each turn: head, ``before``, the words, what closes it, a gap."""

    head: str = "<|head|>{role}\n"
    before: str = ""  # an answer's words
    close: str = "<|end|>"  # behind an answer
    close_other: str | None = None  # behind other messages; as an answer's where None
    close_last: str | None = None  # behind an answer that is the last message
    gap: str = "\n"
    prompt: str | None = None  # the head of an answer where None
    first: str = ""  # before everything
    default_system: str = ""  # where the first message is not the system's
    final: str = ""  # behind everything
    strip: bool = False
    drop_thinking: bool = False  # of answers before the last message of this role
    until: str = "user"
    merge: bool = False  # neighbours of one role
    refuse_system: bool = False
    alternate: bool = False
    names: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)

    def role(self, message: dict[str, str]) -> str:
        return self.names.get(message["role"], message["role"])

    @property
    def asks(self) -> str:
        """The generation prompt."""
        head = self.head.format(role=self.names.get("assistant", "assistant"))
        return head if self.prompt is None else self.prompt

    @property
    def jinja(self) -> str:
        other = self.close if self.close_other is None else self.close_other
        last = self.close if self.close_last is None else self.close_last
        head = self.head.replace("{role}", "' ~ names.get(m.role, m.role) ~ '").replace("\n", "\\n")
        words = "m.content | trim" if self.strip else "m.content"
        refuse = "{%- if m.role == 'system' -%}{{- raise_exception('no system') -}}{%- endif -%}"
        drop = (
            "{%- if m.role == 'assistant' and loop.index0 < last.place and '</think>' in words -%}"
            "{%- set words = words.split('</think>')[-1] -%}{%- endif -%}"
        )
        alternate = (
            "{%- if loop.previtem is defined and loop.previtem.role == m.role -%}"
            "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        )
        joins = "loop.previtem is defined and loop.previtem.role == m.role"
        goes_on = "loop.nextitem is defined and loop.nextitem.role == m.role"
        return "".join(
            [
                f"{{%- set names = {self.names!r} -%}}{{%- set last = namespace(place=-1) -%}}",
                f"{{%- for m in messages -%}}{{%- if m.role == {self.until!r} -%}}",
                "{%- set last.place = loop.index0 -%}{%- endif -%}{%- endfor -%}",
                f"{{{{- {self.first!r} -}}}}",
                f"{{%- if messages[0].role != 'system' -%}}{{{{- {self.default_system!r} -}}}}",
                "{%- endif -%}{%- for m in messages -%}",
                refuse if self.refuse_system else "",
                alternate if self.alternate else "",
                f"{{%- set words = {words} -%}}",
                drop if self.drop_thinking else "",
                f"{{%- if {str(self.merge).lower()} and {joins} -%}}{{{{- '\\n\\n' -}}}}",
                f"{{%- else -%}}{{{{- '{head}' -}}}}",
                f"{{%- if m.role == 'assistant' -%}}{{{{- {self.before!r} -}}}}{{%- endif -%}}",
                "{%- endif -%}{{- words -}}",
                f"{{%- if not ({str(self.merge).lower()} and {goes_on}) -%}}",
                f"{{%- if m.role != 'assistant' -%}}{{{{- {other!r} -}}}}",
                f"{{%- elif loop.last -%}}{{{{- {last!r} -}}}}",
                f"{{%- else -%}}{{{{- {self.close!r} -}}}}{{%- endif -%}}",
                f"{{{{- {self.gap!r} -}}}}{{%- endif -%}}{{%- endfor -%}}",
                f"{{%- if add_generation_prompt -%}}{{{{- {self.asks!r} -}}}}",
                f"{{%- else -%}}{{{{- {self.final!r} -}}}}{{%- endif -%}}",
            ]
        )

    def write(self, messages: Sequence[dict[str, str]], finished: bool = True) -> list[Piece]:
        pieces: list[Piece] = [(self.first, None)]
        if messages[0]["role"] != "system":
            pieces.append((self.default_system, None))
        roles = [message["role"] for message in messages]
        until = max([i for i, role in enumerate(roles) if role == self.until], default=-1)
        last_answer = max(i for i, role in enumerate(roles) if role == "assistant")
        for i, message in enumerate(messages):
            answers = roles[i] == "assistant"
            if self.refuse_system and roles[i] == "system":
                raise Refused
            same_before = i > 0 and roles[i - 1] == roles[i]
            if self.alternate and same_before:
                raise Refused
            joins = self.merge and same_before
            goes_on = self.merge and i + 1 < len(roles) and roles[i + 1] == roles[i]
            words = message["content"].strip() if self.strip else message["content"]
            if self.drop_thinking and answers and i < until:
                words = words.split("</think>")[-1]
            ends = i + 1 == len(roles)
            close = self.close if answers or self.close_other is None else self.close_other
            if answers and ends and self.close_last is not None:
                close = self.close_last
            close, gap = ("", "") if goes_on else (close, self.gap)
            if ends:
                gap += self.final
            head = "\n\n" if joins else self.head.format(role=self.role(message))
            if answers and not joins:
                head += self.before
            if not answers:
                pieces.append((head + words + close + gap, None))
                continue
            closing = (close + gap).rstrip()
            turn, asked = head + words + closing, self.asks
            own = finished or i != last_answer
            marks = [None] * len(head) + [i] * len(words) + [i if own else None] * len(closing)
            begin = common(asked, turn)
            if joins and i > 0 and roles[i - 1] == "assistant":
                # The end of the answer before it is another than in the prompt.
                last = self.close if self.close_last is None else self.close_last
                begin = common(last + self.gap + asked, turn)
            # A marker of the prompt is given whole.
            begin = min([begin, *(m.start() for m in MARKER.finditer(asked) if m.end() > begin)])
            if begin > len(head) and begin < len(asked):
                raise Refused
            marks[begin : len(head)] = [i] * (len(head) - begin)
            marks[:begin] = [None] * begin
            pieces += [(c, mark) for c, mark in zip(turn, marks, strict=True)]
            pieces.append(((close + gap)[len(closing) :], None))
        return pieces


def common(one: str, other: str) -> int:
    """The length of the longest common prefix."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


BEHAVIOURS = {
    "plain": Behaviour(),
    "no gap": Behaviour(gap=""),
    "two line breaks": Behaviour(head="{role}:\n\n", gap="\n\n"),
    "a start of sequence": Behaviour(first="<s>"),
    "a default system message": Behaviour(default_system="<|head|>system\nBe kind.<|end|>\n"),
    "channel markers": Behaviour(before="<|text|>final<|role|>", prompt="<|head|>assistant\n"),
    "a head that goes on": Behaviour(prompt="<|head|>"),
    "an empty think block": Behaviour(before="<think></think>"),
    "a think block on lines": Behaviour(before="<think>\n\n</think>\n\n"),
    "a prompt that opens thinking": Behaviour(
        before="<think>\n\n</think>\n\n", prompt="<|head|>assistant\n<think>\n"
    ),
    "a prompt that no answer follows": Behaviour(prompt="<|head|>assistant\n<think>\n"),
    "two closing tokens": Behaviour(close="<|text|><|end|>", close_other="<|end|>"),
    "space between closing tokens": Behaviour(close=" <|text|>\n<|end|>"),
    "a closing word": Behaviour(close=" END", head="[{role}] ", gap="\n"),
    "no closing marker": Behaviour(head="{role}: ", close="", gap="\n\n"),
    "answers close alone": Behaviour(close="</s>", close_other=""),
    "another marker when last": Behaviour(close="<|end|>", close_last="<|stop|>"),
    "the same with a default system": Behaviour(
        close_last="<|stop|>", gap="", default_system="<|head|>system\nBe kind.<|end|>"
    ),
    "two closing tokens, another marker when last": Behaviour(
        close="<|text|><|end|>",
        close_last="<|stop|>",
        gap="",
        default_system="<|head|>system\nBe kind.<|text|><|end|>",
    ),
    "a marker only when last": Behaviour(close="", close_other="", close_last="</s>"),
    "an end of everything": Behaviour(final="</s>"),
    "an end of everything alone": Behaviour(head="{role}> ", close="", final="</s>"),
    "strips": Behaviour(strip=True),
    "strips without markers": Behaviour(strip=True, head="{role}: ", close="", gap="\n\n"),
    "drops thinking": Behaviour(drop_thinking=True),
    "drops thinking but of the last answer": Behaviour(drop_thinking=True, until="assistant"),
    "drops thinking, another marker": Behaviour(drop_thinking=True, close_last="<|stop|>"),
    "merges": Behaviour(merge=True),
    "merges, another marker": Behaviour(merge=True, close_last="</s>"),
    "refuses the system": Behaviour(refuse_system=True, names={"assistant": "model"}),
    "alternates": Behaviour(alternate=True, refuse_system=True, first="<s>", gap=""),
    "no generation prompt": Behaviour(prompt=""),
    "a space before the answer": Behaviour(head="<|{role}|> ", prompt="<|assistant|>"),
    "heads as tokens": Behaviour(head="<|{role}|>", gap=""),
    "a line break that is generated": Behaviour(head="<|{role}|>\n", prompt="<|assistant|>"),
}


def said(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn; a turn that begins with a role and a colon is of that role."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    role = "assistant"
    for turn in turns:
        role = "user" if role == "assistant" else "assistant"
        for other in ("user", "assistant", "tool"):
            if turn.startswith(other + "="):
                role, turn = other, turn.removeprefix(other + "=")
                break
        messages.append({"role": role, "content": turn})
    return messages


KINDS = {
    "one turn": said("Hi", "Hello there."),
    "three turns": said("Hi", "One.", "And?", "Two.", "More", "Three, at last."),
    "a system message": said("Hi", "Hello", "Again", "Yes", system="Be brief."),
    "a question at the end": said("Hi", "Hello", "And?"),
    "empty answers": said("Hi", "", "And?", ""),
    "answers in a row": said("Hi", "One.", "assistant=Two.", "And?", "assistant=Three."),
    "questions in a row": said("Hi", "user=there", "Hello", "And?", "user=so?", "Yes."),
    "white space around answers": said("Hi", "\n\nOne. \n", " ", "  Two\n\n"),
    "answers of white space": said("Hi", " \n", "And?", "\n"),
    "answers that spell markers": said("Hi", "<|end|>", "<|head|>", "a<|end|>\n<|head|>user\nb"),
    "characters of several tokens": said("Grüße 🎉", "日本語 🎉", "界", "🎉"),
    "thinking": said("Hi", "<think>hm</think>One.", "And?", "<think>so</think>Two."),
    "an answer first": said("assistant=Hello", "Hi", "One."),
    "an answer behind the system": said("assistant=Hello", "Hi", "One.", system="Be kind."),
    "words of the template": said("assistant", "assistant", "user: Hi", "assistant: user"),
    "a tool that speaks": said("Hi", "Wait.", "tool=42", "assistant=It is 42.", "Thanks", "Yes."),
    "answers that begin alike": said("Hi", "<b>One", "And?", "<think"),
}


@cache
def tokenizer(splitting: str, special: bool) -> PreTrainedTokenizerFast:
    """Byte-level tokens of the ways in which real ones differ; its markers special or plain."""
    backend = Tokenizer(models.BPE())
    words = splitting != "anything"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    if splitting == "trimmed":
        backend.post_processor = ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = ["assistant\n\nuser: system Hello there. One.\n", "assistant: Two. END\n\n日本語 🎉"]
    backend.train_from_iterator(texts * 8, trainer)
    backend.add_tokens([AddedToken(marker, special=special) for marker in MARKERS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(pieces)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    special = [*MARKERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["hello answer answer is"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def bytes_of(token: str) -> bytes:
    """The bytes that a token stands for, which byte-level tokens spell in GPT-2's alphabet."""
    if token in MARKERS:
        return token.encode()
    return bytes(_ALPHABET[character] for character in token)


def mask_of(pieces: Sequence[Piece], tokens: Sequence[str]) -> list[bool]:
    """Lay tokens over pieces by their bytes; one is supervised that one answer holds whole."""
    owner = [answer for text, answer in pieces for _ in text.encode()]
    mask, position = [], 0
    for token in tokens:
        size = len(bytes_of(token))
        owners = set(owner[position : position + size])
        mask.append(len(owners) == 1 and owners != {None})
        position += size
    assert position == len(owner)
    return mask
