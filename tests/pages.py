"""Reads HTML as a browser does."""

from html.parser import HTMLParser

from hypothesis import strategies as st


class Page(HTMLParser):
    """What a browser makes of some HTML: its tags, the words outside styles, and the tips."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words: list[str] = []
        self.tips: list[str] = []
        self.classes: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag == "span":
            values = dict(attrs)
            self.tips.append(values.get("title") or "")
            self.classes.append(values["class"] or "")

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() and self.tags[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


ODD = ("<b>", "$x$", "\n", '"', "'", "&amp;", "</span><script>", "\" onclick='", "-->", "\t ")
MARKUP = st.lists(st.sampled_from(["&", "lt", "quot", ";", "<", ">", "/", "b", '"', "'", "\n"]))
CHARACTERS = st.characters(codec="utf-8", exclude_characters="⏎\r")
ANY_TEXT = MARKUP.map("".join) | st.text(CHARACTERS, max_size=6)
