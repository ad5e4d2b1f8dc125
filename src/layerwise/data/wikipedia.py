"""Wikipedia articles as plain text: 107 of them, in the shortened dump that the package `gensim` tests with.

The articles' text is CC BY-SA. Markup is dropped, not rendered: tables, templates and references disappear.
"""

from __future__ import annotations

import bz2
import html
import re
from functools import cache
from xml.etree import ElementTree

from layerwise.data.packages import package_file

PACKAGE = "gensim==4.4.0"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
PIECE = 2000  # characters that a piece has at least, unless its article ends


@cache
def articles() -> dict[str, str]:
    """Plain text by title, paragraphs separated by blank lines."""
    root = ElementTree.fromstring(bz2.decompress(package_file(PACKAGE, DUMP)))
    space = root.tag.partition("}")[0] + "}"
    found = {}
    for page in root.iter(f"{space}page"):
        text = page.findtext(f"{space}revision/{space}text") or ""
        if page.find(f"{space}redirect") is None and page.findtext(f"{space}ns") == "0":
            found[page.findtext(f"{space}title") or ""] = plain(text)
    return found


def plain(wikitext: str) -> str:
    """The prose of an article: no templates, tables, references, files, headings or lists."""
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<ref.*?</ref>|<(math|gallery|code|pre)\b.*?</\1>", "", wikitext, flags=re.S)
    for opening, closing in (("{{", "}}"), ("{|", "|}")):
        start, end = re.escape(opening), re.escape(closing)
        inner = re.compile(f"{start}(?:(?!{start}|{end}).)*{end}", re.S)
        while (shorter := inner.sub("", text)) != text:  # innermost first
            text = shorter
    files = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.I)
    text = files.sub("", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^<>]*>|__[A-Z]+__", "", text)
    lines = [" ".join(html.unescape(line).split()) for line in text.splitlines()]
    return "\n\n".join(line for line in lines if len(line) > 80 and line[0] not in "=*#:;|!{}")


def pieces() -> list[tuple[str, str]]:
    """(title, text): runs of whole paragraphs."""
    found: list[tuple[str, str]] = []
    for title, text in articles().items():
        piece: list[str] = []
        for paragraph in text.split("\n\n") if text else []:
            piece.append(paragraph)
            if sum(map(len, piece)) >= PIECE:
                found.append((title, "\n\n".join(piece)))
                piece = []
        if piece:
            found.append((title, "\n\n".join(piece)))
    return found
