"""The HTML report: one answer as a page that shows how deep each of its tokens went.

`render` turns a `Page` into a single document that needs nothing else: no scripts, no fonts, no files beside it.
The same plans always give the same page, so that two reports can be compared as text.

The depth scale is cut into fixed steps of the model's depth, narrow near full depth because that is where useful
plans lie. Fixed, not fitted to the page: a colour means the same in every report.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from layerwise.plan import Part, Plan, Visit

SOURCES = {"decoded": "decoded one by one", "drafted": "drafted", "verified": "verified"}

# A token of depth share s takes step bisect_right(EDGES, s); OVER is any share above 1, whatever its size.
EDGES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STEP_LABELS = ("under 25%", "25%+", "50%+", "60%+", "70%+", "80%+", "90%+", "100%", "over 100%")
OVER = len(STEP_LABELS) - 1

# Yellow to violet in equal steps of OKLCH lightness, so that the order survives colour blindness and grey print.
# Deeper always stands out more from the page: darker on the light theme, brighter on the dark one.
LIGHT = ("#f9f6c8", "#daf1c0", "#b7ebc2", "#92e3cc", "#73d8db", "#64c9e8", "#6cb6f0", "#81a0ef", "#9889e3")
DARK = ("#393716", "#394826", "#33593d", "#276a5a", "#20787b", "#2f849d", "#518dbc", "#7993d5", "#a498e5")

# How a strip draws a layer, by the parts its visits run: the class of its cell, the mark inside, the legend.
KINDS: dict[tuple[Part, ...], tuple[str, str, str]] = {
    (Part.BOTH,): ("run", "", "run"),
    (): ("skip", "", "skipped"),
    (Part.BOTH, Part.BOTH): ("repeat", "&times;2", "repeated"),
    (Part.ATTENTION,): ("attention", "a", "attention only"),
    (Part.MLP,): ("mlp", "m", "MLP only"),
    (Part.THIN,): ("thin", "t", "thin MLP"),
    (Part.BRIDGE,): ("bridge", "b", "bridged"),
    (Part.ATTENTION, Part.MLP): ("split", "am", "attention and MLP in separate visits"),
}

MAX_BARS = 600  # more would be thinner than a pixel
MAX_STRIPS = 100  # a policy that picks layers freely can make a plan per token; the page must still open
OPEN_STRIPS = 8  # those after are folded away

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f27; --soft: #5b6472; --line: #d9dde4; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #e6e9ee; --soft: #9ba4b2; --line: #333a45; --panel: #1c2027; }
}
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { margin: 0 0 20px; font-size: 25px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 17px; font-weight: 650; } .label { margin: 0 0 4px; }
h2 small, .note, .label, summary, .plan p span { color: var(--soft); font-size: 13.5px; font-weight: 400; }
.prompt, pre { margin: 0; padding: 12px 16px; border-radius: 8px; background: var(--panel); max-height: 15em;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.summary { margin: 20px 0 0; padding: 12px 0; border: solid var(--line); border-width: 1px 0; color: var(--soft); }
.summary span { margin-right: 26px; display: inline-block; } .summary b { color: var(--ink); }
.answer { font-size: 17px; line-height: 1.95; white-space: pre-wrap; overflow-wrap: anywhere; }
.token { margin-right: 1px; padding: 2px 0; border-radius: 3px; background: var(--fill); color: var(--text);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.newline::before { content: "\\21B5"; padding: 0 4px; } .empty::before { content: "\\2205"; padding: 0 4px; }
.sources .token { border-radius: 3px 3px 0 0; padding-bottom: 1px; border-bottom: 3px none var(--ink); }
.sources .decoded { border-bottom: 1px solid var(--ink); }
.sources .drafted { border-bottom-style: dotted; } .sources .verified { border-bottom-style: double; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 14px 0 0; padding: 0; list-style: none;
  color: var(--soft); font-size: 13px; }
.legend li { display: flex; align-items: center; gap: 6px; } .legend i { font-style: normal; }
.scale li { flex: 1 1 84px; flex-direction: column; align-items: stretch; gap: 3px; margin: 0 1px 4px 0; }
.legend.scale { gap: 0; } .swatch { height: 14px; border-radius: 2px; background: var(--fill); }
.plan { margin: 0 0 18px; } .plan code { overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
.plan p { display: flex; justify-content: space-between; gap: 24px; margin: 0 0 5px; } .plan p span { flex: none; }
.strip { display: grid; grid-template-columns: repeat(var(--layers), minmax(9px, 30px)); gap: 2px; }
.cell, .key { height: 24px; border: 1px solid transparent; border-radius: 3px; background: var(--fill);
  color: var(--text); font: 600 11px/22px system-ui, sans-serif; text-align: center; white-space: nowrap; }
.key { width: 24px; } .skip { background: none; border: 1px dashed var(--soft); opacity: .65; }
.bridge { background: none; border: 1px dashed var(--soft); color: var(--soft); }
.attention, .mlp, .split { border-color: var(--fill); color: var(--ink);
  background: color-mix(in srgb, var(--fill) 28%, var(--page)); } .dense .cell { font-size: 8px; letter-spacing: -1px; }
.number { height: 15px; color: var(--soft); font: 11px/15px system-ui; text-align: center; } .strip.dense { gap: 1px; }
summary { margin: 0 0 14px; cursor: pointer; } svg { display: block; width: 100%; min-width: 600px; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg line { stroke: var(--soft); } .bar { fill: var(--fill); }
"""


@dataclass(frozen=True)
class Token:
    """One token of the answer: its text, the plan it went through, and which of SOURCES it came from."""

    text: str
    plan: Plan
    source: str = "decoded"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"'{self.source}' is not a source of tokens: choose one of {', '.join(SOURCES)}")


@dataclass(frozen=True)
class Page:
    """What one report shows; `layers` is the model's depth, `command` the line that makes the report again."""

    model: str
    layers: int
    prompt: str
    tokens: tuple[Token, ...]
    tokens_per_second: float
    stop_reason: str
    command: str = ""


def render(page: Page) -> str:
    """The page as a self-contained HTML document.

    Raises:
        ValueError: a token's plan names a layer that the model lacks.
    """
    plans = Counter(token.plan for token in page.tokens)
    for plan in plans:
        plan.check(page.layers)
    sections = [_header(page), _answer(page)]
    if plans:
        sections += [_strips(plans, page.layers), _chart(page)]
    if page.command:
        sections.append(f'<h2>Make this report again</h2>\n<pre tabindex="0">{_text(page.command)}</pre>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.model)}: layers per token</title>\n<style>{CSS}{_scale_css()}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


# -- text and colour -------------------------------------------------------------------------------------

# HTML has no way to write control characters, and byte-level models do emit them: show their pictures instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


def _text(text: str) -> str:
    """`text` as HTML, for elements and quoted attributes; half surrogates, which no file can hold, become '?'."""
    return escape(text.translate(_CONTROLS).encode("utf-8", "replace").decode())


def _count(number: float, noun: str) -> str:
    """A number of things in words; a plan's depth is exact, so its halves are written out."""
    return f"{number:.9g} {noun}" + ("" if number == 1 else "s")


def _step(depth: float, layers: int) -> int:
    """The step of the depth scale, 0 (shallow) to OVER."""
    return OVER if depth > layers else bisect_right(EDGES, depth / layers)


def _luminance(colour: str) -> float:
    """Relative luminance of '#rrggbb', as WCAG 2 defines it."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two colours, 1 to 21; text wants 4.5."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def text_colour(fill: str) -> str:
    """Black or white, whichever reads better on `fill`; the better one always reaches 4.5."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(fill, ink))


def _scale_css() -> str:
    light, dark = (
        " ".join(f".d{n} {{ --fill: {fill}; --text: {text_colour(fill)}; }}" for n, fill in enumerate(fills))
        for fills in (LIGHT, DARK)
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"


# -- sections --------------------------------------------------------------------------------------------


def _header(page: Page) -> str:
    count = len(page.tokens)
    depth = f"{sum(token.plan.depth for token in page.tokens) / count:.1f}" if count else "&ndash;"
    return (
        f'<header>\n<h1>{_text(page.model)}</h1>\n<p class="label">Prompt</p>\n'
        f'<div class="prompt" dir="auto" tabindex="0">{_text(page.prompt)}</div>\n'
        f'<p class="summary"><span><b>{count}</b> {"token" if count == 1 else "tokens"}</span> '
        f"<span><b>{page.tokens_per_second:.1f}</b> tokens/s</span> "
        f"<span><b>{depth}</b> of {page.layers} layers per token</span> "
        f"<span>stopped: <b>{_text(page.stop_reason)}</b></span></p>\n</header>"
    )


def _answer(page: Page) -> str:
    """The answer and the keys to its colours and underlines."""
    title = "<h2>Answer <small>coloured by the share of the model's layers each token ran</small></h2>\n"
    if not page.tokens:
        return title + '<p class="note">The answer is empty: no token was generated.</p>'
    used = {token.source for token in page.tokens}
    spans = "".join(_token(token, page.layers) for token in page.tokens)
    scale = (f'<li><i class="swatch d{n}"></i>{label}</li>' for n, label in enumerate(STEP_LABELS))
    keys = (f'<li class="sources"><i class="token {s}">token</i>{SOURCES[s]}</li>' for s in SOURCES if s in used)
    style, origin = (" sources", _legend("origin", keys)) if len(used) > 1 else ("", "")
    return title + f'<div class="answer{style}" dir="auto">{spans}</div>\n{_legend("scale", scale)}{origin}'


def _legend(name: str, items: Iterable[str]) -> str:
    return f'<ul class="legend {name}">{"".join(items)}</ul>'


def _token(token: Token, layers: int) -> str:
    # A token without ink would hide its colour; CSS puts a mark before it, which copying the answer leaves out.
    blank = " empty" if not token.text else "" if token.text.strip("\r\n") else " newline"
    title = _text(f"{token.text!r}\n{_count(token.plan.depth, 'layer')} of {layers}, {token.source}\nplan {token.plan}")
    style = f"token d{_step(token.plan.depth, layers)} {token.source}{blank}"
    return f'<span class="{style}" title="{title}">{_text(token.text)}</span>'


def _strips(plans: Counter[Plan], layers: int) -> str:
    """One strip of layer cells per plan, most used first."""
    ranked = plans.most_common(MAX_STRIPS)
    drawn = [_strip(plan, uses, layers) for plan, uses in ranked]
    kinds = {_cell(visits)[0] for plan, _ in ranked for visits in _by_layer(plan, layers)}
    keys = (f'<li><i class="key {k} d6">{mark}</i>{words}</li>' for k, mark, words in KINDS.values() if k in kinds)
    parts = ["<h2>The plan as a strip <small>one cell per layer of the model</small></h2>", *drawn[:OPEN_STRIPS]]
    if more := drawn[OPEN_STRIPS:]:
        parts += [f"<details>\n<summary>{_count(len(more), 'more plan')}</summary>", *more]
        if left := len(plans) - len(ranked):
            tokens = _count(plans.total() - sum(uses for _, uses in ranked), "token")
            parts.append(f'<p class="note">{_count(left, "further plan")}, used by {tokens}, not drawn.</p>')
        parts.append("</details>")
    return "\n".join([*parts, _legend("kinds", keys)])


def _strip(plan: Plan, uses: int, layers: int) -> str:
    cells, dense = [], " dense" if layers > 48 else ""  # marks must fit cells of 10 pixels
    for layer, visits in enumerate(_by_layer(plan, layers)):
        kind, mark = _cell(visits)
        title = f"layer {layer}: {' '.join(map(str, visits)) or 'skipped'}"
        cells.append(f'<div class="cell {kind}" title="{title}">{mark}</div>')
    numbers = (f'<div class="number">{layer if layer % 5 == 0 else ""}</div>' for layer in range(layers))
    return (
        f'<div class="plan"><p><code>{_text(str(plan))}</code>'
        f"<span>{_count(plan.depth, 'layer')} · {_count(uses, 'token')}</span></p>"
        f'<div class="scroll"><div class="strip d{_step(plan.depth, layers)}{dense}" style="--layers: {layers}">'
        f"{''.join(cells)}{''.join(numbers)}</div></div></div>"
    )


def _by_layer(plan: Plan, layers: int) -> list[list[Visit]]:
    """The visits of each layer, in the plan's order."""
    visits: list[list[Visit]] = [[] for _ in range(layers)]
    for visit in plan:
        visits[visit.layer].append(visit)
    return visits


def _cell(visits: Sequence[Visit]) -> tuple[str, str]:
    """How a strip draws a layer with these visits: the kind of its cell, and the mark inside."""
    parts = tuple(sorted(visit.part for visit in visits if visit.part is not Part.BRIDGE))
    if visits and not parts:
        return KINDS[(Part.BRIDGE,)][:2]
    if parts in KINDS:
        return KINDS[parts][:2]
    return "repeat", f"{parts[0] if len(set(parts)) == 1 else ''}&times;{len(parts)}"


def _chart(page: Page) -> str:
    """Bars of layers run along the answer; a long answer's bars are means over equal runs of tokens."""
    depths = [token.plan.depth for token in page.tokens]
    size = -(-len(depths) // MAX_BARS)
    bins = [depths[at : at + size] for at in range(0, len(depths), size)]
    means = [sum(group) / len(group) for group in bins]
    left, base = 30, 130
    width, scale = min(16.0, (960 - left) / len(means)), 110 / max(page.layers, *means)
    full, end = base - page.layers * scale, left + width * len(means)
    bars = []
    for n, mean in enumerate(means):
        first, last = n * size + 1, n * size + len(bins[n])
        where = f"token {first}" if first == last else f"tokens {first}-{last}, mean"
        bars.append(
            f'<rect class="bar d{_step(mean, page.layers)}" x="{left + n * width:.2f}" y="{base - mean * scale:.2f}" '
            f'width="{width * 0.9:.2f}" height="{mean * scale:.2f}">'
            f"<title>{where}: {_count(round(mean, 1), 'layer')}</title></rect>"
        )
    note = f", each bar the mean of {size} tokens" if size > 1 else ""
    last_number = f'<text x="{end:.2f}" y="148" text-anchor="end">{len(depths)}</text>' if end - left > 40 else ""
    return (
        f"<h2>Layers run per token <small>along the answer{note}; the dashed line is full depth</small></h2>\n"
        f'<div class="scroll"><svg viewBox="0 0 970 154" role="img" aria-label="Layers run per token">{"".join(bars)}'
        f'<line x1="{left}" x2="960" y1="{base}" y2="{base}"/>'
        f'<line x1="{left}" x2="960" y1="{full:.2f}" y2="{full:.2f}" stroke-dasharray="4 4"/>'
        f'<text x="{left - 6}" y="{base + 4}" text-anchor="end">0</text>'
        f'<text x="{left - 6}" y="{full + 4:.2f}" text-anchor="end">{page.layers}</text>'
        f'<text x="{left}" y="148">1</text>{last_number}</svg></div>'
    )
