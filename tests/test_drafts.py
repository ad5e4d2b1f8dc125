"""The text form of drafts: it round-trips, and what is no draft is refused in a line that says what to write."""

from __future__ import annotations

import pytest
from tiny import one_line

from layerwise.decoding.drafts import MOST, Draft
from layerwise.plan import Plan

LAYERS = 30


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ("auto", Draft("auto")),
        ("off", Draft("off")),
        ("ngram", Draft("ngram")),
        ("ngram,3", Draft("ngram", length=3)),
        ("head", Draft("head")),
        ("head,15", Draft("head", length=15)),
        ("exit:1", Draft("exit", exit=1)),
        ("exit:29", Draft("exit", exit=29)),
        ("exit:8,6", Draft("exit", exit=8, length=6)),
        ("plan:0-5 20-29", Draft("plan", plan=Plan.parse("0-5 20-29"))),
        ("plan:0-2 3*2 4a 5m 0,4", Draft("plan", plan=Plan.parse("0-2 3*2 4a 5m 0"), length=4)),
        ("corpus,4", Draft("corpus", length=4)),
        ("tree", Draft("tree")),
        ("tree,5", Draft("tree", length=5)),
        ("ngram+corpus", Draft("corpus", lookup=True)),
        ("ngram+head", Draft("head", lookup=True)),
        ("ngram+exit:8,6", Draft("exit", exit=8, length=6, lookup=True)),
        ("ngram+plan:0-5 29", Draft("plan", plan=Plan.parse("0-5 29"), lookup=True)),
    ],
)
def test_text_and_back(text: str, draft: Draft) -> None:
    assert Draft.parse(text, LAYERS) == draft
    assert Draft.parse(text) == draft  # the depth of the model need not be known
    assert str(draft) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  auto ", "auto"),
        ("\texit:8\n", "exit:8"),
        ("exit:8, 6", "exit:8,6"),
        ("exit: 8 , 6 ", "exit:8,6"),
        ("ngram , 3", "ngram,3"),
        (" plan:  0-5   7 ,4", "plan:0-5 7,4"),
        ("plan:0 1 2 5 5", "plan:0-2 5*2"),
        ("ngram+plan:0-5 ", "ngram+plan:0-5"),
        ("exit:08,06", "exit:8,6"),
    ],
)
def test_other_ways_to_write_the_same(text: str, same: str) -> None:
    assert str(Draft.parse(text, LAYERS)) == same


FORMS = ("write auto, off, ngram, corpus, tree, head", '"exit:8"', '"plan:0-5 20-29"')
LENGTHS = ("1 to 15",)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("", FORMS),
        ("fast", ("'fast'", *FORMS)),
        ("Auto", FORMS),
        ("exits:3", FORMS),
        ("exit", FORMS),
        ("plan", FORMS),
        ("exit,3", FORMS),
        ("auto:3", FORMS),
        ("head:3", FORMS),
        ("ngram:3", FORMS),
        ("8", FORMS),
        (":", FORMS),
        (",", FORMS),
        ("ngram+", FORMS),
        ("ngram+tree", FORMS),  # has the row's own words anyway
        ("ngram+off", ("'ngram+off'", *FORMS)),
        ("ngram+auto", FORMS),
        ("ngram+ngram", FORMS),
        ("exit:8+ngram", ("exit:8",)),
        ("exit:", ("after how many layers", "exit:8")),
        ("exit:x", ("after how many layers", "exit:8")),
        ("exit:-1", ("after how many layers",)),
        ("exit:2.5", ("after how many layers",)),
        ("exit:0", ("'exit:0'", "1 to 29", "30 layers")),
        ("exit:30", ("'exit:30'", "1 to 29", "30 layers")),
        ("exit:8,0", LENGTHS),
        ("exit:8,16", LENGTHS),
        ("exit:8,x", LENGTHS),
        ("exit:8,", LENGTHS),
        ("exit:8,-1", LENGTHS),
        ("ngram,1000", LENGTHS),
        ("head,0", LENGTHS),
        ("auto,3", ("ngram, corpus, tree, head, exit and plan", *LENGTHS)),
        ("off,3", ("ngram, corpus, tree, head, exit and plan",)),
        ("plan:", ("at least one layer",)),
        ("plan:,4", ("at least one layer",)),
        ("plan:0-5 x", ("'x'",)),
        ("plan:5-0", ("'0-5'",)),
        ("plan:0-30", ("0-29",)),
        ("plan:0-5 3*99", ("repeat",)),
        ("plan:0,2a", (*LENGTHS, "separated by spaces")),
        ("plan:0 1,20", (*LENGTHS, "separated by spaces")),
        ("plan:0,1,2,5", ("'plan:0,1,2,5'", "separated by spaces")),
        ("exit:8,6,4", ("'exit:8,6,4'", "behind a comma")),
    ],
)
def test_what_is_no_draft_is_refused_in_one_line(text: str, mentions: tuple[str, ...]) -> None:
    one_line(lambda: Draft.parse(text, LAYERS), *mentions)


def test_without_a_depth_an_exit_has_no_upper_end() -> None:
    assert MOST == 15
    assert Draft.parse("exit:99").exit == 99
    one_line(lambda: Draft.parse("exit:0"), "1 to one less than the model has")
