"""The HTML report: what it must show, and what it must not let through."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from layerwise.plan import Plan
from layerwise.report import html
from layerwise.report.html import Page, Token, render

LAYERS = 30
FULL = Plan.parse("0-29")
SKIPPING = Plan.parse("0-5 8-29")
MIXED = Plan.parse("0-9 12a 13m 14-20 21*2 22-29")
TIMES = "\N{MULTIPLICATION SIGN}"
VOID = {"meta", "br", "hr", "img", "input", "link", "base"}


class Element:
    """A parsed element: enough of a DOM to ask what a reader would see."""

    def __init__(self, tag: str, attrs: dict[str, str]) -> None:
        self.tag, self.attrs, self.children = tag, attrs, []

    @property
    def classes(self) -> list[str]:
        return self.attrs.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str) -> list[Element]:
        """Every element below with tag or class `name`, in the page's order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] * (name == child.tag or name in child.classes) + child.all(name)
        return found

    def one(self, name: str) -> Element:
        (element,) = self.all(name)
        return element


class Strict(HTMLParser):
    """Builds the tree, and fails on any tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(document: str) -> Element:
    parser = Strict()
    parser.feed(document)
    parser.close()
    assert parser.open == [parser.root], f"not closed: {[element.tag for element in parser.open[1:]]}"
    return parser.root


def page(*tokens: Token, **changes: object) -> Page:
    """A page of `tokens` with nothing remarkable about the rest."""
    return replace(Page("a model", LAYERS, "a prompt", tokens, 12.34, "end of text"), **changes)


def tokens(*uses: tuple[Plan, int]) -> tuple[Token, ...]:
    return tuple(Token(" word", plan) for plan, count in uses for _ in range(count))


def kinds(strip: Element) -> list[str]:
    """What each cell of a strip is drawn as, by layer."""
    return [" ".join(set(cell.classes) - {"cell"}) for cell in strip.all("cell")]


# -- the document ----------------------------------------------------------------------------------------

MARKUP = "</pre><script>alert('1 & 2')</script>\"onload=\"x"


@pytest.mark.parametrize("field", ["model", "prompt", "stop_reason", "command"])
def test_markup_in_a_field_is_shown_and_not_run(field: str) -> None:
    tree = parse(render(page(Token("a", FULL), **{field: MARKUP})))
    assert tree.all("script") == []
    assert MARKUP in tree.one("body").text


def test_markup_in_a_token_is_shown_and_not_run() -> None:
    tree = parse(render(page(Token(MARKUP, FULL))))
    token = tree.one("token")
    assert tree.all("script") == []
    assert token.text == MARKUP
    assert set(token.attrs) == {"class", "title"}
    assert repr(MARKUP) in token.attrs["title"]


@pytest.mark.parametrize("count", [0, 1, 2, 120, 601])
def test_the_document_is_complete_and_needs_nothing_else(count: int) -> None:
    plans = (FULL, SKIPPING, MIXED)
    document = render(page(*(Token(" w", plans[n % 3], list(html.SOURCES)[n % 3]) for n in range(count)), command="go"))
    tree = parse(document)
    assert document.startswith("<!DOCTYPE html>")
    assert [child.tag for child in tree.one("html").children if isinstance(child, Element)] == ["head", "body"]
    assert not re.search(r"http|url\(|@import|src=|href=", document)
    assert tree.all("link") == tree.all("script") == []


def test_the_same_page_renders_the_same() -> None:
    shown = page(*tokens((FULL, 2), (SKIPPING, 2), (MIXED, 2)))
    assert render(shown) == render(shown)


def test_the_summary_line() -> None:
    summary = parse(render(page(*tokens((FULL, 2), (SKIPPING, 1))))).one("summary").text
    assert "3 tokens" in summary and "12.3 tokens/s" in summary
    assert "29.3 of 30 layers per token" in summary
    assert "end of text" in summary


def test_no_command_no_section() -> None:
    assert parse(render(page(Token("a", FULL)))).all("pre") == []
    assert parse(render(page(Token("a", FULL), command="layerwise run"))).one("pre").text == "layerwise run"


def test_an_empty_answer_renders() -> None:
    tree = parse(render(page()))
    assert "0 tokens" in tree.one("summary").text
    assert "no token was generated" in tree.one("main").text
    assert tree.all("token") == tree.all("strip") == tree.all("svg") == []


def test_a_plan_too_deep_for_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names layer 29"):
        render(page(Token("a", FULL), layers=29))


# -- the answer ------------------------------------------------------------------------------------------


def test_every_token_is_there_in_order() -> None:
    texts = ["\n", "The", " <b>", " cat", "\n\n", "&amp;", "  ", "é", "", " 猫", "\t'\"", "The"]
    tree = parse(render(page(*(Token(text, FULL) for text in texts))))
    answer = tree.one("answer")
    assert [token.text for token in answer.all("token")] == texts
    assert answer.text == "".join(texts)
    assert re.search(r"\.answer \{[^}]*white-space: pre-wrap", html.CSS)


def test_tokens_without_ink_are_marked() -> None:
    texts = ["", "\n", "\n\n", " ", "a\n"]
    shown = parse(render(page(*(Token(text, FULL) for text in texts)))).all("token")
    assert ["empty" in token.classes for token in shown] == [True, False, False, False, False]
    assert ["newline" in token.classes for token in shown] == [False, True, True, False, False]


def test_text_that_html_cannot_hold_is_replaced() -> None:
    document = render(page(Token("a\x00\x1b\udc80", FULL)))
    assert parse(document).one("token").text == "a\u2400\u241b?"
    document.encode()


def test_the_tooltip_tells_text_layers_and_plan() -> None:
    title = parse(render(page(Token(" a\n", MIXED)))).one("token").attrs["title"]
    assert title == "' a\\n'\n28 layers of 30, decoded\nplan 0-9 12a 13m 14-20 21*2 22-29"
    halves = parse(render(page(Token("a", Plan.parse("0a"))))).one("token").attrs["title"]
    assert "0.5 layers of 30" in halves


@pytest.mark.parametrize(
    ("plan", "step"),
    [("0", 0), ("0-14", 2), ("0-17", 3), ("0-26", 6), ("0-28 29a", 6), ("0-29", 7), ("0-29 29a", 8), ("0-29*9", 8)],
)
def test_the_colour_is_the_share_of_the_depth(plan: str, step: int) -> None:
    tree = parse(render(page(Token("a", Plan.parse(plan)))))
    assert f"d{step}" in tree.one("token").classes
    assert f"d{step}" in tree.one("bar").classes
    assert f"d{step}" in tree.one("strip").classes


def test_the_scale_is_whole() -> None:
    scale = parse(render(page(Token("a", FULL)))).one("scale")
    assert [swatch.classes[-1] for swatch in scale.all("swatch")] == [f"d{n}" for n in range(9)]
    assert [item.text for item in scale.all("li")] == list(html.STEP_LABELS)
    assert len(html.STEP_LABELS) == len(html.LIGHT) == len(html.DARK) == len(html.EDGES) + 2


def test_colours_are_ordered_and_text_on_them_is_readable() -> None:
    assert html.contrast("#ffffff", "#000000") == pytest.approx(21)
    assert html.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    css = parse(render(page())).one("style").text
    for fills, page_colour in ((html.LIGHT, "#ffffff"), (html.DARK, "#14171c")):
        against_page = [html.contrast(fill, page_colour) for fill in fills]
        assert against_page == sorted(set(against_page)), "deeper must stand out more"
        for step, fill in enumerate(fills):
            assert f".d{step} {{ --fill: {fill}; --text: {html.text_colour(fill)}; }}" in css
            assert html.contrast(fill, html.text_colour(fill)) >= 4.5


# -- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", html.SOURCES)
def test_one_source_needs_no_legend(source: str) -> None:
    tree = parse(render(page(Token("a", FULL, source), Token("b", SKIPPING, source))))
    assert tree.all("origin") == tree.all("sources") == []


def test_several_sources_are_told_apart() -> None:
    tree = parse(render(page(Token("a", FULL, "verified"), Token("b", FULL), Token("c", FULL, "verified"))))
    assert [item.text for item in tree.one("origin").all("li")] == ["tokendecoded one by one", "tokenverified"]
    assert "sources" in tree.one("answer").classes
    assert [
        source for token in tree.one("answer").all("token") for source in html.SOURCES if source in token.classes
    ] == [
        "verified",
        "decoded",
        "verified",
    ]
    styles = {source: re.findall(rf"\.sources \.{source} \{{ ([^}}]*) \}}", html.CSS) for source in html.SOURCES}
    assert all(len(found) == 1 for found in styles.values())
    assert len({found[0] for found in styles.values()}) == len(html.SOURCES)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="'guessed' is not a source"):
        Token("a", FULL, "guessed")


# -- strips ----------------------------------------------------------------------------------------------


def test_a_strip_draws_each_layer_as_it_ran() -> None:
    strip = parse(render(page(Token("a", MIXED)))).one("strip")
    drawn = kinds(strip)
    expected = {10: "skip", 11: "skip", 12: "attention", 13: "mlp", 21: "repeat"}
    assert drawn == [expected.get(layer, "run") for layer in range(LAYERS)]
    marks = {layer: cell.text for layer, cell in enumerate(strip.all("cell")) if cell.text}
    assert marks == {12: "a", 13: "m", 21: f"{TIMES}2"}
    assert "--layers: 30" in strip.attrs["style"]


def test_repeats_are_counted_wherever_they_are() -> None:
    strip = parse(render(page(Token("a", Plan.parse("0-2*3 1a 3a*2 4a 5 4m")), layers=6))).one("strip")
    assert kinds(strip) == ["repeat", "repeat", "repeat", "repeat", "split", "run"]
    assert [cell.text for cell in strip.all("cell")] == [f"{TIMES}3", f"{TIMES}4", f"{TIMES}3", f"a{TIMES}2", "am", ""]
    assert strip.all("cell")[1].attrs["title"] == "layer 1: 1 1 1 1a"


def test_strips_come_most_used_first() -> None:
    tree = parse(render(page(*tokens((SKIPPING, 1), (MIXED, 3), (FULL, 2)))))
    captions = [plan.one("p").text for plan in tree.all("plan")]
    assert captions == [f"{MIXED}28 layers · 3 tokens", f"{FULL}30 layers · 2 tokens", f"{SKIPPING}28 layers · 1 token"]
    assert [kinds(strip).count("skip") for strip in tree.all("strip")] == [2, 0, 2]


def test_every_fifth_layer_is_numbered() -> None:
    strip = parse(render(page(Token("a", FULL)))).one("strip")
    numbers = [number.text for number in strip.all("number")]
    assert len(numbers) == LAYERS
    assert {n: text for n, text in enumerate(numbers) if text} == {n: str(n) for n in (0, 5, 10, 15, 20, 25)}


def test_the_legend_of_cells_names_what_occurs() -> None:
    def named(plan: Plan) -> list[str]:
        return [item.children[-1] for item in parse(render(page(Token("a", plan)))).one("kinds").all("li")]

    assert named(FULL) == ["run"]
    assert named(SKIPPING) == ["run", "skipped"]
    assert named(MIXED) == ["run", "skipped", "repeated", "attention only", "MLP only"]
    assert named(Plan.parse("0*3")) == ["skipped", "repeated"]


def test_many_plans_fold_away_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_STRIPS", 12)
    plans = [(Plan.of(range(n + 1)), 20 - n) for n in range(15)]
    tree = parse(render(page(*tokens(*plans))))
    folded = tree.one("details")
    assert len(tree.all("strip")) == 12
    assert len(folded.all("strip")) == 12 - html.OPEN_STRIPS
    assert folded.children[1].text == "4 more plans"
    assert folded.one("note").text == "3 further plans, used by 21 tokens, not drawn."


# -- the chart -------------------------------------------------------------------------------------------


def heights(tree: Element) -> list[float]:
    return [float(bar.attrs["height"]) for bar in tree.all("bar")]


def test_bars_are_as_high_as_tokens_are_deep() -> None:
    tree = parse(render(page(*(Token("a", Plan.of(range(depth))) for depth in (30, 15, 3)))))
    full, half, tenth = heights(tree)
    assert half == pytest.approx(full / 2) and tenth == pytest.approx(full / 10)
    assert [bar.text for bar in tree.all("bar")] == ["token 1: 30 layers", "token 2: 15 layers", "token 3: 3 layers"]


def test_a_token_deeper_than_the_model_stays_in_the_chart() -> None:
    bar, usual = parse(render(page(*tokens((Plan.parse("0-29 0-29"), 1), (FULL, 1))))).all("bar")
    assert float(bar.attrs["y"]) >= 0
    assert float(usual.attrs["height"]) == pytest.approx(float(bar.attrs["height"]) / 2)


@pytest.mark.parametrize(("count", "bars"), [(1, 1), (600, 600), (601, 301), (1201, 401), (5000, 556)])
def test_long_answers_share_bars(count: int, bars: int) -> None:
    tree = parse(render(page(*tokens((FULL, count)))))
    drawn = tree.all("bar")
    assert len(drawn) == bars <= html.MAX_BARS
    assert len(tree.one("answer").all("token")) == count
    right = max(float(bar.attrs["x"]) + float(bar.attrs["width"]) for bar in drawn)
    assert right <= 960


def test_a_shared_bar_is_the_mean() -> None:
    tree = parse(render(page(*tokens((FULL, 1), (Plan.parse("0-14"), 1), (FULL, 599)))))
    assert heights(tree)[0] == pytest.approx(heights(tree)[1] * 0.75)
    assert [bar.text for bar in tree.all("bar")][:1] == ["tokens 1-2, mean: 22.5 layers"]
    assert tree.all("bar")[-1].text == "token 601: 30 layers"
    assert "each bar the mean of 2 tokens" in tree.one("main").text
