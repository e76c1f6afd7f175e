"""A report as sections of paragraphs, tables and pictures, written as one HTML page or as Markdown.

Both are made from texts that anyone may have written into a results file: everything is escaped.
"""

import html
import re
from collections.abc import Callable
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 75rem;
       background: Canvas; color: CanvasText; }
h1 { font-size: 1.35rem; line-height: 1.4; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
div { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.5rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; }
"""


class Table(NamedTuple):
    caption: str
    head: list[str]
    rows: list[list[str]]


class Picture(NamedTuple):
    """An <svg> element whose ink is currentColor. Markdown has none."""

    caption: str
    svg: str


class Section(NamedTuple):
    title: str
    blocks: list[str | Table | Picture]


def table(caption: str, rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> Table:
    """A line a row; columns that say nothing of any row are left out."""
    cells = {head: [cell(row) for row in rows] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(column)}
    return Table(caption, list(cells), [list(line) for line in zip(*cells.values(), strict=True)])


def figure(value: float | None, unit: float = 1) -> str:
    """Three digits, or all before the point; of None, nothing. A unit of 1e9 gives the value in units of 1e9."""
    if value is None:
        return ""
    value /= unit
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def spread(low: float, high: float, form: Callable[[float], str] = figure) -> str:
    return f"({form(low)} .. {form(high)})"


def plain(text: object) -> str:
    """In one line, without what can't be shown or written (control characters, halves of surrogate pairs)."""
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "�" for letter in words)


def to_html(title: str, sections: list[Section]) -> str:
    """One page that loads nothing from anywhere, which its content security policy ensures."""

    def cells(tag: str, line: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{shown(cell)}</{tag}>" for cell in line) + "</tr>"

    def block(content) -> str:
        if isinstance(content, Table):
            lines = "\n".join(cells("td", line) for line in content.rows)
            head = f"<caption>{shown(content.caption)}</caption>\n<thead>{cells('th', content.head)}</thead>"
            return f"<div><table>{head}\n<tbody>\n{lines}\n</tbody></table></div>"
        if isinstance(content, Picture):
            return f"<figure>{content.svg}<figcaption>{shown(content.caption)}</figcaption></figure>"
        return f"<p>{shown(content)}</p>"

    def shown(text: str) -> str:
        return html.escape(plain(text))

    policy = "default-src 'none'; style-src 'unsafe-inline'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{shown(title)}</h1>",
    ]
    for section in sections:
        parts += [f"<h2>{shown(section.title)}</h2>", *map(block, section.blocks)]
    return "\n".join([*parts, "</body>\n</html>\n"])


def to_markdown(title: str, sections: list[Section]) -> str:
    """The same in GitHub's Markdown, less the pictures."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(shown, cells)) + " |"

    def block(content) -> str:
        if isinstance(content, Table):
            rule = "|" + " --- |" * len(content.head)
            return "\n".join([f"**{shown(content.caption)}**\n", line(content.head), rule, *map(line, content.rows)])
        return shown(content)

    def shown(text: str) -> str:
        return re.sub(r"([\\`*_|\[\]#~])", r"\\\1", html.escape(plain(text), quote=False))

    parts = [f"# {shown(title)}"]
    for section in sections:
        blocks = [content for content in section.blocks if not isinstance(content, Picture)]
        parts += [f"## {shown(section.title)}", *map(block, blocks)]
    return "\n\n".join(parts) + "\n"
