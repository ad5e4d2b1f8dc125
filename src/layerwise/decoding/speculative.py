"""Self-speculative decoding: a draft proposes, the model's own plan verifies, and the output is the model's own.

A round of a batch:

    propose   a few tokens for each row, by whatever drafts
    verify    one pass of the target plan over the last token and the drafted ones of every row
    judge     per row the longest run of drafted tokens that stands, and one token of the target's own
    learn     caches are rolled back to what stands, drafters are told

Each row advances by its own number of tokens; one that has finished leaves the batch. What comes out is what plain
decoding gives: token for token when greedy, in distribution when sampling (see `judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from layerwise.decoding.choice import likeliest
from layerwise.decoding.drafters import (
    Drafter,
    HeadDrafter,
    PlanDrafter,
    PolicyDrafter,
    Proposal,
    Worth,
)
from layerwise.decoding.drafts import MOST, Draft
from layerwise.decoding.judge import Judge
from layerwise.decoding.ngrams import CorpusDrafter, NGramDrafter
from layerwise.decoding.pass_times import BESIDES
from layerwise.decoding.target import Read, Target, Watched
from layerwise.decoding.trees import TreeDrafter
from layerwise.decoding.tuner import HOPE, Hope, Tuner
from layerwise.model.cache import Cache
from layerwise.model.packing import last_of
from layerwise.plan import Plan, Route
from layerwise.trace import Phase, RowsOfTrace, Source, Trace

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

NGRAM_PRICE = 0.002  # of a plain step, for a token
HEAD_HOPE, HEAD_LAYERS = 0.35, 5.5  # the head's own layer is one; what its calls take besides is worth some more
SURPLUS = 4  # tokens that a confident draft may go on beyond the best length


class Crew:
    """The drafters of one decoding, and who drafts next."""

    def __init__(self, model: LayerwiseForCausalLM, target: Target, draft: Draft, judge: Judge) -> None:
        self.target, self.draft = target, draft
        depth = round(sum(plan.depth for plan in target.plans) / target.rows)
        self.tuner: Tuner = model.tuner(draft, target.rows, judge.temperature, depth)
        self.drafters: dict[str, Drafter] = {}
        self.prices: dict[str, float] = {}
        self.hopes: dict[str, Hope] = {}  # of this round, where a draft knows
        # A tree is looked up row by row, and in a batch every further token is dear: second guesses do not pay there.
        # For one row the chains stay beside it: a long copy is often right where the tree has spent tokens on doubts.
        auto, counted = draft.kind == "auto", model.ngrams is not None
        tree = draft.kind == "tree" or (auto and counted and target.rows == 1)
        self.ngram: NGramDrafter | None = None
        if draft.kind == "ngram" or draft.lookup or auto:
            self.ngram = NGramDrafter(target)
            self.drafters["ngram"] = self.ngram
        self.corpus: CorpusDrafter | None = None
        if draft.kind == "corpus" or (auto and counted):
            self.corpus = CorpusDrafter(target, model.ngrams)
            self.drafters["corpus"] = self.corpus
        self.tree: TreeDrafter | None = None
        if tree:
            # Routed attention convolves over the tokens before, which in a tree are not those of one text.
            branches = 1 if model.runtime.backbone.attention else 2
            self.tree = TreeDrafter(target, NGramDrafter(target), model.ngrams, branches)
            self.drafters["tree"] = self.tree
        head, runtime = model.exit_head, model.head_runtime
        # The head looks at states inside the target's plan: there must be one plan, and it must get that far.
        fits = head is not None and (not head.exit or (target.uniform and head.exit < len(target.plans[0])))
        if draft.kind == "head" and not fits:
            raise ValueError(
                f"the exit head drafts after {head.exit} visits of a plan that all rows share: "
                "use one such plan, or another draft"
            )
        if draft.kind in ("head", "auto") and fits:
            self._add("head", HeadDrafter("head", target, head, runtime, judge.pick), HEAD_LAYERS + head.exit)
        for plans in _plans(model, draft, target.plans):
            name = f"plan:{plans[0]}"
            logits, vocabulary = model.draft_logits() if draft.trust is None else (model.runtime.logits, None)
            drafter = PlanDrafter(
                name, target, plans, judge.pick, logits, vocabulary, not draft.lookup, draft.trust or 0.0
            )
            self._add(name, drafter, plans[0].depth + 1)
        if draft.kind == "policy":
            logits, vocabulary = model.draft_logits()
            drafter = PolicyDrafter("policy", target, model.policy, judge.pick, logits, vocabulary, not draft.lookup)
            self._add("policy", drafter, target.plans[0].depth + 1)
        for drafter in self.drafters.values():
            target.cuts |= drafter.cuts

    def _add(self, name: str, drafter: Drafter, layers: float) -> None:
        self.drafters[name] = drafter
        self.prices[name] = layers / (self.target.plans[0].depth + BESIDES)

    def begin(self, prompt: Read) -> None:
        for drafter in self.drafters.values():
            drafter.begin(prompt)

    def propose(self, last: Tensor, most: int) -> tuple[str, Proposal]:
        """Who drafts this round, by name, and what."""
        name, length, worth = self._turn(last, min(most, MOST))
        if not length:
            return "off", Proposal([[] for _ in range(len(last))])
        if worth is not _always and name not in ("ngram", "tree"):
            # A confident draft may go on beyond what is best on average.
            length = min(length + SURPLUS, most, MOST)
        return name, self.drafters[name].propose(last, length, worth)

    def _turn(self, last: Tensor, most: int) -> tuple[str, int, Worth]:
        if most < 1:
            return "off", 0, _never
        prices, self.hopes = dict(self.prices), {"head": HEAD_HOPE}
        match = self.ngram.match(last) if self.ngram is not None else 0
        if match:
            prices["ngram"], self.hopes["ngram"] = NGRAM_PRICE, self.ngram.hopes(last, most)
        known = self.corpus.hopes(last, most) if self.corpus is not None else []
        if known:
            prices["corpus"], self.hopes["corpus"] = NGRAM_PRICE, known
        trusts: list[float] = []
        if self.tree is not None:  # to look one up takes time too, and where trees fail that is for nothing
            least = self.tuner.least("tree", most) if self.draft.kind == "auto" else 0.0
            trusts = self.tree.grow(last, most, least)
        if trusts:
            prices["tree"], self.hopes["tree"] = NGRAM_PRICE, trusts
        if self.draft.kind == "auto":
            return self.tuner.choose(prices, most, hopes=self.hopes)
        if match and self.draft.lookup:
            prices = {"ngram": NGRAM_PRICE}
        if not prices:
            return "off", 0, _never
        if self.draft.length is not None:
            (name,) = prices
            return name, min(self.draft.length, most), _always
        return self.tuner.choose(prices, most, rest=False, hopes=self.hopes)

    def learn(self, read: Read) -> None:
        for drafter in self.drafters.values():
            drafter.learn(read)

    def select(self, rows: Sequence[int]) -> None:
        for drafter in self.drafters.values():
            drafter.select(rows)


def _never(trust: float) -> bool:
    return False


def _always(trust: float) -> bool:
    return True


def _plans(model: LayerwiseForCausalLM, draft: Draft, targets: Sequence[Plan]) -> list[list[Plan]]:
    """The plans that draft, each as one plan a row."""
    if draft.kind == "auto":
        exits = [exit for exit in model.exits if exit < len(targets[0])]
    else:
        exits = [] if draft.exit is None else [draft.exit]
    drafts = [[target[:exit] for target in targets] for exit in exits]
    return drafts if draft.plan is None else [[draft.plan] * len(targets)]


@dataclass
class _Texts:
    """The rows' tokens, each as long as it got; `live` are those under way."""

    buffer: Tensor  # (rows, room)
    lengths: list[int]
    live: list[int]
    ends: list[int | None] = field(default_factory=list)  # length at which a row was done
    ahead: list[int] = field(default_factory=list)  # how many tokens each row is longer than what is cached of it

    def last(self) -> Tensor:
        """The last token of each live row, (live, 1)."""
        return torch.stack([self.buffer[row, self.lengths[row] - 1 : self.lengths[row]] for row in self.live])


@torch.no_grad()
def speculate(
    model: LayerwiseForCausalLM,
    input_ids: Tensor,
    prompt: tuple[Tensor, Tensor, list[int]],
    plans: Sequence[Plan] | Route,
    cache: Cache,
    draft: Draft,
    judge: Judge,
    padding: Tensor | None,
    streamer: BaseStreamer | None = None,
    trace: Trace | None = None,
    keep: bool = True,
) -> Tensor:
    """Decode by `draft` after a prompt.

    Args:
        input_ids: (rows, width) the prompt as `generate` got it.
        prompt: token ids (rows, width) packed to the left, their embeddings, and how many each row has.
        plans: the target of each row, or a route that decides it in the pass over the prompt.
        padding: fills rows up that end early; None if all rows go on until all are done.
        keep: whether the cache is wanted afterwards; if so it holds all but the last token of every row.

    Returns:
        (rows, longest) prompt and answer, as `generate` returns them.
    """
    rows, width = input_ids.shape
    room = (width + 4096 if judge.endings.longest is None else judge.endings.longest) + MOST + 2
    texts = _Texts(
        input_ids.new_zeros(rows, max(room, width + MOST + 2)), [width] * rows, list(range(rows)), [None] * rows
    )
    texts.buffer[:, :width] = input_ids
    rows_of_trace = None if trace is None else trace.of(list(range(rows)))
    before = list(cache.lengths)
    ids, embedded, counts = prompt
    read = None
    if not isinstance(plans, Sequence):  # who can draft depends on the target's plans: the prompt is read first
        plans, read = _routed(model, plans, prompt, cache, rows_of_trace)
    if trace is not None:
        trace.targets = list(plans)
    target = Target(model, list(plans), cache, set(), rows_of_trace, keep=keep)
    try:
        crew = Crew(model, target, draft, judge)
        read = target.read(ids, counts, embedded) if read is None else read
        crew.begin(read)
        texts.ahead = [width + 1 - length for length in cache.lengths]
        logits = model.runtime.logits(last_of(read.deep, counts), target.plans).float()
        chosen = [([], token) for _, token in _choices(judge, logits, Proposal([[]] * rows), texts)]
        del read, logits  # the states of the whole prompt, which can be those of every layer
        _emit(texts, judge, chosen, padding, streamer, trace, [Source.DECODED] * rows)
        _leave(texts, judge, target, crew, padding)
        while texts.live:
            before = list(cache.lengths)
            _round(model, target, crew, judge, texts, padding, streamer, trace)
            _leave(texts, judge, target, crew, padding)
    except BaseException:  # Ctrl-C too: a cache that the caller goes on with must hold whole tokens only
        target.forget()
        cache.rollback([min(old, now) for old, now in zip(before, cache.lengths, strict=True)])
        target.gather()
        raise
    target.gather()
    if keep:
        longest = max(texts.ends)  # rows that nobody pads may have gone on beyond it
        cache.rollback([min(n, longest - by) for n, by in zip(cache.lengths, texts.ahead, strict=True)])
    if streamer is not None:
        streamer.end()
    return _rectangle(texts, padding)


def _routed(
    model: LayerwiseForCausalLM,
    route: Route,
    prompt: tuple[Tensor, Tensor, list[int]],
    cache: Cache,
    trace: RowsOfTrace | None,
) -> tuple[tuple[Plan, ...], Read]:
    """Read the prompt by a route: the plans that it decides, and the states on the way."""
    ids, embedded, counts = prompt
    watched = Watched(route)
    deep = model.runtime.forward(embedded, watched, counts, cache, trace, Phase.PREFILL)
    return watched.plans, Read(ids, list(counts), watched.states, deep)


def _round(
    model: LayerwiseForCausalLM,
    target: Target,
    crew: Crew,
    judge: Judge,
    texts: _Texts,
    padding: Tensor | None,
    streamer: BaseStreamer | None,
    trace: Trace | None,
) -> None:
    """Propose, verify, judge, learn; the tokens that stand are added to `texts`."""
    began = perf_counter()
    last, longest = texts.last(), judge.endings.longest
    left = 2**31 if longest is None else longest - min(texts.lengths[row] for row in texts.live)
    name, proposal = crew.propose(last, left - 1)
    if longest is not None:  # the rows that are further on have room for fewer
        proposal = proposal.within([longest - texts.lengths[row] - 1 for row in texts.live])
    drafted_at = perf_counter()
    drafted = proposal.tokens
    counts = [1 + len(tokens) for tokens in drafted]
    tokens = last.new_zeros(len(counts), max(counts))
    tokens[:, 0] = last[:, 0]
    for row, proposed in enumerate(drafted):
        tokens[row, 1 : counts[row]] = torch.tensor(proposed, dtype=tokens.dtype, device=tokens.device)
    parents = [[-1, *(at + 1 for at in proposal.parents_of(row))] for row in range(len(drafted))]  # by columns
    read = target.verify(tokens, counts, parents if proposal.branching else None)
    logits = model.runtime.logits(read.deep, target.plans).float()
    chosen = _choices(judge, logits, proposal, texts)
    columns = [[0, *(number + 1 for number in stand)] for stand, _ in chosen]
    target.cache.retain(counts, columns)
    crew.learn(read.along(columns))
    stood = [len(stand) for stand, _ in chosen]
    seconds = drafted_at - began
    hope = crew.hopes.get(name, HOPE)
    shares = [sum(number in stand for stand, _ in chosen) / len(chosen) for number in range(max(counts) - 1)]
    crew.tuner.note(name, len(shares), shares, seconds, max(counts), perf_counter() - drafted_at, hope)
    if trace is not None:
        trace.drafts[name] += 1
        trace.drafted += sum(counts) - len(counts)
        trace.accepted += sum(stood)
    runs = [([proposed[at] for at in stand], token) for proposed, (stand, token) in zip(drafted, chosen, strict=True)]
    last_source = [Source.VERIFIED if len(proposed) else Source.DECODED for proposed in drafted]
    _emit(texts, judge, runs, padding, streamer, trace, last_source)


def _choices(judge: Judge, logits: Tensor, proposal: Proposal, texts: _Texts) -> list[tuple[list[int], int]]:
    """Per live row the numbers of the drafted tokens that stand, and the token after them.

    `logits` are (rows, width, vocabulary), after the text and after each drafted token.
    """
    drafted = proposal.tokens
    if judge.plain:
        best = likeliest(logits).tolist()
        return [_walked(drafted[at], proposal.parents_of(at), best[at]) for at in range(len(drafted))]
    return [
        judge.judge(
            logits[at, : len(drafted[at]) + 1],
            drafted[at],
            proposal.parents_of(at),
            None if proposal.q is None else [one[at] for one in proposal.q],
            texts.buffer[row : row + 1],
            texts.lengths[row],
            row,
        )
        for at, row in enumerate(texts.live)
    ]


def _walked(drafted: Sequence[int], parents: Sequence[int], best: Sequence[int]) -> tuple[list[int], int]:
    """As `Judge.judge`, where best[0] is the target's choice after the text, best[k + 1] that after drafted[k]."""
    stand, at = [], -1
    for number, (token, parent) in enumerate(zip(drafted, parents, strict=True)):
        if parent == at and token == best[at + 1]:
            stand.append(number)
            at = number
    return stand, best[at + 1]


def _emit(
    texts: _Texts,
    judge: Judge,
    runs: Sequence[tuple[Sequence[int], int]],
    padding: Tensor | None,
    streamer: BaseStreamer | None,
    trace: Trace | None,
    last_source: Sequence[Source],
) -> None:
    """Add to each live row its drafted tokens that stood and the one after them, up to the one that ends it."""
    alone = padding is not None or len(texts.lengths) == 1
    for at, (row, (proposed, token)) in enumerate(zip(texts.live, runs, strict=True)):
        for number, one in enumerate([*proposed, token]):
            texts.buffer[row, texts.lengths[row]] = one
            texts.lengths[row] += 1
            if streamer is not None:
                streamer.put(torch.tensor([one]))
            if trace is not None:
                trace.made(row, Source.DRAFTED if number < len(proposed) else last_source[at])
            length = texts.lengths[row]
            if texts.ends[row] is None and judge.finished(one, texts.buffer[row : row + 1], length, row):
                texts.ends[row] = length
            if (alone and texts.ends[row] is not None) or length == judge.endings.longest:
                break


def _leave(texts: _Texts, judge: Judge, target: Target, crew: Crew, padding: Tensor | None) -> None:
    """Take the rows that are done out of the batch, and out of the cache what they accepted beyond their end."""
    kept = [texts.lengths[row] - texts.ahead[row] for row in texts.live]
    if kept != target.cache.lengths:
        target.cache.rollback(kept)
    if padding is not None or len(texts.lengths) == 1:
        going = [row for row in texts.live if texts.ends[row] is None]
    else:  # without an end token nobody pads, as in transformers: all go on until all are done
        until = judge.endings.longest if None in texts.ends else max(texts.ends)
        going = [row for row in texts.live if until is None or texts.lengths[row] < until]
    if len(going) < len(texts.live):
        if going:
            places = [texts.live.index(row) for row in going]
            crew.select(places)
            target.select(places)
        texts.live = going


def _rectangle(texts: _Texts, padding: Tensor | None) -> Tensor:
    longest = max(texts.ends)
    whole = texts.buffer[:, :longest].clone()
    if padding is not None:
        for row, end in enumerate(texts.ends):
            whole[row, end:] = padding
    return whole
