"""Draft trees: a pass over a tree equals its branches, the branch that is kept is text, and how trees grow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_generate import ragged
from test_laws import EVERY_ARCHITECTURE, EVERY_MODEL, FIXED, FULL, PADDING, Row, close, feed, row_of, runtime
from test_laws import same_content as same
from test_speculative import FREE, LENGTHS, NEW, attached, crossed, one
from torch import Tensor

from layerwise import Trace
from layerwise.decoding.drafters import Proposal
from layerwise.decoding.ngram_model import NGramModel
from layerwise.decoding.ngrams import HOPES, NGramDrafter
from layerwise.decoding.target import Read
from layerwise.decoding.trees import LEAST, Node, TreeDrafter, in_depth
from layerwise.decoding.tuner import STARTING_WEIGHT, Tuner
from layerwise.model.cache import Cache
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan

Tree = list[int]  # of each token the number of the one it follows


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tree_of(rng: random.Random, tokens: int) -> Tree:
    """Many branches, of which some are long: most tokens follow the one before."""
    return [at - 1 if rng.random() < 0.6 else rng.randrange(-1, at) for at in range(tokens)]


def branch(tree: Tree, at: int) -> list[int]:
    """The way to the token numbered `at`, itself included."""
    return [] if at < 0 else [*branch(tree, tree[at]), at]


# -- one pass ------------------------------------------------------------------------------------------------


def feed_tree(of: Runtime, rows: list[Row], plans: list[Plan], kept: Cache, trees: list[Tree]) -> Tensor:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
    embedded, counts = of.backbone.embedding(tokens), list(map(len, rows))
    return of.backbone.logits(of.forward(embedded, plans, counts, kept, parents=trees))


@EVERY_MODEL
@EVERY_ARCHITECTURE
@pytest.mark.parametrize("plans", [[FULL] * 4, [FULL, FIXED[0], FULL, FIXED[4]]], ids=["one plan", "several"])
def test_a_pass_over_trees_equals_their_branches(name: str, attention: str, plans: list[Plan]) -> None:
    rng, of, rows = random.Random(5), runtime(name, attention), 4
    kept = Cache(rows, 8)
    feed(of, [row_of(rng, tokens) for tokens in (9, 3, 12, 1)], plans, kept)  # some beyond the window of 7
    feed(of, [row_of(rng, tokens) for tokens in (1, 2, 2, 1)], [FIXED[1]] * 2 + plans[2:], kept)  # leaves holes
    before, texts = kept.part(range(rows)), [row_of(rng, tokens) for tokens in (7, 12, 1, 9)]
    trees = [tree_of(rng, len(text)) for text in texts]
    found = feed_tree(of, texts, plans, kept, trees)
    for row, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        for at in range(len(text)):
            way = branch(tree, at)
            expected = feed(of, [[text[node] for node in way]], [plans[row]], before.part([row]))[0]
            close(found[row, way], expected)
    # One branch of each is kept: as if the others had never been.
    ways = [branch(tree, rng.randrange(len(tree))) for tree in trees]
    kept.retain(list(map(len, texts)), ways)
    chosen = [[text[node] for node in way] for text, way in zip(texts, ways, strict=True)]
    feed(of, chosen, plans, before)
    same(kept, before, close)
    more = [row_of(rng, 3) for _ in range(rows)]
    for ours, theirs in zip(feed(of, more, plans, kept), feed(of, more, plans, before), strict=True):
        close(ours, theirs)


def test_a_tree_may_be_the_first_that_is_read() -> None:
    of, rng = runtime("llama"), random.Random(3)
    text, tree = row_of(rng, 6), [-1, 0, 0, 1, -1, 4]
    found = feed_tree(of, [text], [FULL], Cache(1, 8), [tree])[0]
    for at in range(len(text)):
        way = branch(tree, at)
        close(found[way], feed(of, [[text[node] for node in way]], [FULL])[0])


def test_a_chain_as_a_tree_is_the_chain() -> None:
    of, rng = runtime("gemma3"), random.Random(1)
    kept, other = Cache(2, 8), Cache(2, 8)
    for cache in (kept, other):
        feed(of, [[3, 4, 5], [6, 7, 8, 9]], [FULL] * 2, cache)
    rows = [row_of(rng, 5), row_of(rng, 5)]
    found = feed_tree(of, rows, [FULL] * 2, kept, [list(range(-1, 4))] * 2)
    close(found, torch.stack(feed(of, rows, [FULL] * 2, other)))
    kept.retain([5, 5], [range(2), range(5)])
    other.rollback([5, 9])
    same(kept, other, close)


# -- how they grow -------------------------------------------------------------------------------------------


def test_in_depth_keeps_every_branch_and_puts_the_likeliest_first() -> None:
    rng = random.Random(2)
    for _ in range(50):
        tree = tree_of(rng, rng.randint(1, 12))
        order = sorted(range(len(tree)), key=lambda at: (len(branch(tree, at)), rng.random()))
        place = {at: number for number, at in enumerate(order)} | {-1: -1}
        grown = [Node(at, place[tree[at]], 1 / (1 + place[at])) for at in order]  # tokens are the old numbers
        found = in_depth(grown)
        assert all(node.parent < at for at, node in enumerate(found))
        parents = [node.parent for node in found]
        ways = {tuple(found[node].token for node in branch(parents, at)) for at in range(len(found))}
        assert ways == {tuple(branch(tree, at)) for at in range(len(tree))}
        first = -1  # the likeliest after the likeliest, and so on
        while any(node.parent == first for node in found):
            likeliest = max((node.trust, at) for at, node in enumerate(found) if node.parent == first)[1]
            assert likeliest == first + 1
            first = likeliest


def drafter(model: NGramModel | None, *texts: Row, branches: int = 2) -> TreeDrafter:
    target: Any = SimpleNamespace()
    made = TreeDrafter(target, NGramDrafter(target), model, branches)
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True)
    made.begin(Read(rows, list(map(len, texts)), {}, rows))
    return made


def proposed(made: TreeDrafter, last: Tensor, most: int = 9) -> Proposal:
    made.grow(last, 9)
    return made.propose(last, most, lambda trust: True)


def two_minds() -> NGramModel:
    """After 1 comes 2 (3 of 4 times) or, after 9 1, comes 3; after 2 comes 4."""
    return NGramModel.fit([([1], [2])] * 7 + [([9, 1], [3])] * 2 + [([2], [4])] * 3, 2)


def test_a_tree_takes_the_likeliest_token_next() -> None:
    made = drafter(two_minds(), [5, 9])
    last = torch.tensor([[1]])
    # 3 after "9 1" is sure to 2 of 3. After 1 alone 2 is sure to .7 and 3 to .2: so 2 gets .7 / .8 of the rest.
    expected = [2 / 3, (1 / 3) * 0.7 / 0.8, (1 / 3) * 0.7 / 0.8 * 0.75]
    assert made.grow(last, 9) == pytest.approx(expected, abs=2e-3)
    for most, tokens, parents in ((1, [3], [-1]), (2, [3, 2], [-1, -1]), (9, [3, 2, 4], [-1, -1, 1])):
        found = proposed(made, last, most)
        assert (found.tokens, found.parents) == ([tokens], [parents]) and found.branching == (most > 1)
    alone = proposed(drafter(two_minds(), [5, 9], branches=1), last)
    assert alone.tokens == [[3]] and not alone.branching


def test_own_words_come_first_and_rows_have_trees_of_their_own() -> None:
    made = drafter(two_minds(), [9, 1, 7, 8, 9], [6, 6])
    found = proposed(made, torch.tensor([[1], [2]]), 4)
    assert found.tokens == [[7, 8, 9, 3], [4]] and found.parents == [[-1, 0, 1, -1], [-1]]
    half = HOPES[2]
    trusts = made.grow(torch.tensor([[1], [2]]), 3)
    assert trusts[0] == pytest.approx((half + 0.75) / 2, abs=2e-3)
    made.select([1])
    made.learn(Read(torch.tensor([[2]]), [1], {}, torch.zeros(1)))
    assert proposed(made, torch.tensor([[1]])).tokens == [[2, 4, 3]]


def test_what_is_sure_but_for_rounding_leaves_something_to_others() -> None:
    model = NGramModel.fit([([9], [7])] * 9000 + [([9], [8])], 1)
    assert model.after([9]) == (7, 1.0)  # in half precision
    made = drafter(model, [6, 9, 7, 6])  # whose own words say 7 too
    assert made.grow(torch.tensor([[9]]), 9)[0] == HOPES[2]
    assert proposed(made, torch.tensor([[9]]), 2).tokens == [[7, 8]]


def test_nothing_known_is_nothing_drafted() -> None:
    for model in (None, two_minds()):
        made = drafter(model, [5, 6])
        assert made.grow(torch.tensor([[7]]), 9) == []
        assert proposed(made, torch.tensor([[7]])).tokens == [[]]
    assert all(trust >= LEAST for trust in drafter(None, [1, 1, 1, 1, 1]).grow(torch.tensor([[1]]), 99))


def test_a_tree_that_cannot_pay_is_not_grown() -> None:
    made, last = drafter(two_minds(), [5, 9]), torch.tensor([[1]])
    first = 2 / 3 + (1 / 3) * 0.7 / 0.8  # together, see above
    assert len(made.grow(last, 9, first - 0.01)) == 3
    assert made.grow(last, 9, first + 0.01) == [] and made.propose(last, 9, lambda trust: True).tokens == [[]]
    made.own.found = None  # type: ignore[method-assign, assignment]
    assert made.grow(last, 9, 1.01) == []  # nothing is looked up


def test_the_tuner_learns_how_much_of_a_trees_hopes_comes_true() -> None:
    tuner, trusts = Tuner(), [0.6, 0.3, 0.3, 0.1]
    tuner.note("off", 0, 0.0, 0.0, 1, 1.0)
    for width in range(2, 6):
        tuner.note("off", 0, 0.0, 0.0, width, 1.0 + 0.2 * (width - 1))
    name, length, _ = tuner.choose({"tree": 0.0}, 15, hopes={"tree": trusts})
    assert (name, length) == ("tree", 3)  # 2.2 tokens in 1.6 steps; 1.9 in 1.4 and 2.3 in 1.8 are less
    tuner.note("tree", 3, 0.6, 0.0, 4, 1.6, trusts)
    way = tuner.ways["tree"]
    true = (0.6 + STARTING_WEIGHT) / (1.2 + STARTING_WEIGHT)
    assert way.gains(trusts, 9) == pytest.approx([trust * true for trust in trusts])
    for _ in range(60):
        tuner.note("tree", 3, 0.3, 0.0, 4, 1.6, trusts)
    assert tuner.choose({"tree": 0.0}, 15, hopes={"tree": trusts})[0] == "off"


# -- decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["tree,3", "tree,9"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_second_guess_stands_where_the_first_is_wrong(name: str, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved, drafters = attached(name), [], []
    retain, begin = Cache.retain, TreeDrafter.begin

    def spy(cache: Cache, counts: list[int], kept: list[list[int]]) -> None:
        moved.append(any(way != list(range(len(way))) for way in kept))
        retain(cache, counts, kept)

    monkeypatch.setattr(Cache, "retain", spy)
    monkeypatch.setattr(TreeDrafter, "begin", lambda self, prompt: (drafters.append(self), begin(self, prompt)))
    for batch in (one(), ragged(*LENGTHS)):
        moved.clear()
        plain, trace = model.generate(**batch, **FREE), Trace()
        monkeypatch.setattr(model, "ngrams", crossed([plain]))
        assert torch.equal(model.generate(**batch, **FREE, draft=draft, trace=trace), plain)
        assert any(moved) and 0.1 < trace.acceptance < 0.9
        assert trace.drafts.total() < 0.8 * NEW
        known, whole = drafters[-1].own.texts[0], plain[drafters[-1].target.numbers[0]].tolist()
        assert known == whole[-1 - len(known) : -1]  # what drafts learn is the branch that stood


def test_auto_chooses_between_tree_and_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row all three, and each can win a round; of a batch the chains alone."""
    model, offered, rng = attached("llama"), [], random.Random(0)
    plain = model.generate(**one(), **FREE)
    monkeypatch.setattr(model, "ngrams", crossed([plain]))
    choose, lookups = Tuner.choose, {"corpus", "ngram", "tree"}

    def turn(self: Tuner, prices: dict[str, float], *given: Any, **more: Any) -> Any:
        offered.append(sorted(prices))
        ours = sorted(lookups & set(prices))
        return (rng.choice(ours), 2, lambda trust: True) if ours else choose(self, prices, *given, **more)

    monkeypatch.setattr(Tuner, "choose", turn)
    monkeypatch.setattr(Tuner, "least", lambda *_: 0.0)
    trace = Trace()
    assert torch.equal(model.generate(**one(), **FREE, draft="auto", trace=trace), plain)
    assert any(lookups <= set(names) for names in offered) and lookups <= set(trace.drafts)
    offered.clear()
    batch = ragged(*LENGTHS)
    whole = model.generate(**batch, **FREE)
    assert torch.equal(model.generate(**batch, **FREE, draft="auto"), whole)
    assert offered and not any("tree" in names for names in offered)
