"""Reads a written report back, by rules of its own."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Of a page: its tables as (caption, head, lines), its tags with their attributes, and the text by tag."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self.open, self.texts = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        self.open.append(tag)
        if tag == "table":
            self.tables.append(("", [], []))
        elif tag == "tr":
            self.tables[-1][2].append([])
        elif tag in ("td", "th"):
            self.tables[-1][2][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass
        if tag == "thead":
            caption, _, lines = self.tables[-1]
            self.tables[-1] = (caption, lines.pop(), lines)

    def handle_data(self, text):
        tag = self.open[-1] if self.open else ""
        self.texts[tag] = self.texts.get(tag, "") + text
        if tag == "caption":
            self.tables[-1] = (text, *self.tables[-1][1:])
        elif tag in ("td", "th"):
            self.tables[-1][2][-1][-1] += text

    def table(self, caption: str) -> list[dict[str, str]]:
        """The lines of the only table whose caption begins so."""
        [(_, head, lines)] = [table for table in self.tables if table[0].startswith(caption)]
        return [dict(zip(head, line, strict=True)) for line in lines]


def markdown_tables(text: str) -> list[tuple[str, list, list]]:
    """(caption, head, lines) of each, by GitHub's rules: cells end at pipes without a backslash."""

    def cells(line):
        parts = re.split(r"(?<!\\)\|", line)[1:-1]
        return [re.sub(r"\\(.)", r"\1", unescaped(part.strip())) for part in parts]

    def unescaped(part):
        return part.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")

    found = []
    for caption, table in re.findall(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", text, re.M):
        head, _, *lines = map(cells, table.splitlines())
        found.append((re.sub(r"\\(.)", r"\1", unescaped(caption)), head, lines))
    return found


def numbers(cell: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", cell)]
