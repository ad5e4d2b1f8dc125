"""The laws of the runtime: a cached pass, a batch, a rolled back cache: all equal a slow walk written down here."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import torch
from slow import slow_walk
from tiny import ARCHITECTURES, LAYERS, VOCABULARY, WINDOW, model, random_plan
from torch import Tensor, nn

from layerwise.model import cache as cache_module
from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache, SlotStore
from layerwise.model.runtime import Runtime
from layerwise.plan import Part, Plan
from layerwise.trace import Phase, Trace

FULL = Plan.full(LAYERS)
# Layer 0 twice, layer 0 left out, a jump back, backwards, partial visits, a block repeated, MLPs alone, one visit.
FIXED = [
    Plan.parse(text, LAYERS)
    for text in ("0*2 1-5", "1-5", "0-3 1-5", "5 3 3 2 0", "0 1m 2a*2 2 4m 5a", "0 1-3*2 5", "0-5m", "4")
]
EVERY_MODEL = pytest.mark.parametrize("attention", ["sdpa", "eager"])
EVERY_ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
PADDING = 5  # a token like any other: whoever attends to padding is found out

Row = list[int]
Law = Callable[[Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def runtime(name: str, attention: str = "sdpa") -> Runtime:
    return Runtime(Backbone(model(name, attention=attention)))


def row_of(rng: random.Random, tokens: int) -> Row:
    return [rng.randrange(VOCABULARY) for _ in range(tokens)]


def plans_of(rng: random.Random, number: int) -> list[Plan]:
    return [random_plan(rng) for _ in range(number)]


def feed(
    of: Runtime, rows: Sequence[Row], plans: Sequence[Plan], kept: Cache | None = None, trace: Trace | None = None
) -> list[Tensor]:
    """One pass over rows of any lengths; the logits of each row's tokens."""
    width = max(1, *map(len, rows))
    tokens = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
    hidden = of.forward(of.backbone.embedding(tokens), plans, list(map(len, rows)), kept, trace)
    return [logits[: len(row)] for row, logits in zip(rows, of.backbone.logits(hidden), strict=True)]


def alone(of: Runtime, row: Row, plan: Plan) -> Tensor:
    """Logits of one row in one pass, without a cache."""
    return feed(of, [row], [plan])[0]


def chunks(rng: random.Random, rows: Sequence[Row], least: int = 0, most: int = 7) -> Iterator[list[Row]]:
    """Cut rows into passes of `least` to `most` tokens each, until all is fed."""
    rest = [list(row) for row in rows]
    while any(rest):
        counts = [rng.randint(least, most) for _ in rest]
        yield [row[:count] for row, count in zip(rest, counts, strict=True)]
        rest = [row[count:] for row, count in zip(rest, counts, strict=True)]


def feed_in_chunks(
    of: Runtime, rows: Sequence[Row], plans: Sequence[Plan], kept: Cache, rng: random.Random
) -> list[Tensor]:
    passes = [feed(of, part, plans, kept) for part in chunks(rng, rows)]
    return [torch.cat(parts) for parts in zip(*passes, strict=True)]


def close(found: Tensor, expected: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def exact(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected)


# -- one pass, and chunks ------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_the_full_plan_equals_the_models_own_forward(name: str, attention: str) -> None:
    of = runtime(name, attention)
    for rows, tokens in ((1, 1), (1, WINDOW + 1), (3, 3 * WINDOW)):
        ids = torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        found = of.backbone.logits(of.forward(of.backbone.embedding(ids), [FULL] * rows))
        close(found, of.backbone.model(input_ids=ids, use_cache=False).logits, atol=1e-5)


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_an_uncached_pass_equals_the_slow_walk(name: str, attention: str) -> None:
    rng = random.Random(1)
    of = runtime(name, attention)
    for plan in [*FIXED[:5], *plans_of(rng, 2)]:
        row = row_of(rng, WINDOW + 3)
        close(alone(of, row, plan), slow_walk(name, of.backbone.model, row, [plan] * len(row)))


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_cached_equals_uncached_token_by_token_and_in_chunks_of_any_size(name: str, attention: str) -> None:
    rng = random.Random(2)
    of = runtime(name, attention)
    for at, plan in enumerate([FULL, *FIXED, *plans_of(rng, 3)]):
        row, kept = row_of(rng, 3 * WINDOW), Cache(1, 1)
        passes = chunks(rng, [row], least=1, most=7 if at % 3 else 1)
        close(torch.cat([feed(of, part, [plan], kept)[0] for part in passes]), alone(of, row, plan))
        assert kept.lengths == [len(row)]


# -- batches -------------------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_a_ragged_uncached_batch_equals_its_rows(name: str, attention: str) -> None:
    rng = random.Random(4)
    of = runtime(name, attention)
    for plans in (plans_of(rng, 4), FIXED[:4], [FIXED[2]] * 4):
        rows = [row_of(rng, tokens) for tokens in (5, 1, 3 * WINDOW, 2 * WINDOW)]
        for row, plan, found in zip(rows, plans, feed(of, rows, plans), strict=True):
            close(found, alone(of, row, plan))


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_a_ragged_cached_batch_equals_its_rows_though_some_bring_no_tokens(name: str, attention: str) -> None:
    rng = random.Random(5)
    of = runtime(name, attention)
    for plans in (plans_of(rng, 4), plans_of(rng, 4), FIXED[:4], [FIXED[2]] * 4):
        rows = [row_of(rng, tokens) for tokens in (5, 1, 3 * WINDOW, 2 * WINDOW)]
        kept = Cache(len(rows), 1)
        for row, plan, found in zip(rows, plans, feed_in_chunks(of, rows, plans, kept, rng), strict=True):
            close(found, alone(of, row, plan))
        assert kept.lengths == [len(row) for row in rows]
        stored = [tensor for store in kept.slots.values() for tensor in (store.keys, store.values)]
        assert not any(tensor[at, :, len(row) :].any() for tensor in stored for at, row in enumerate(rows))


@EVERY_ARCHITECTURE
def test_a_row_that_joins_while_another_decodes_equals_it_alone(name: str) -> None:
    rng = random.Random(18)
    of = runtime(name)
    for plans in ([FULL, FULL], FIXED[:2], plans_of(rng, 2)):
        rows, kept = [row_of(rng, WINDOW + 1), row_of(rng, WINDOW + 1)], Cache(2, 1)
        first, _ = feed(of, [rows[0][:-1], []], plans, kept)
        second, joined = feed(of, [rows[0][-1:], rows[1]], plans, kept)  # as wide as the longest row, yet no square
        close(torch.cat([first, second]), alone(of, rows[0], plans[0]))
        close(joined, alone(of, rows[1], plans[1]))


# -- holes ---------------------------------------------------------------------------------------------------


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_a_token_attends_to_those_that_visited_its_slot_and_to_none_other(name: str, attention: str) -> None:
    rng = random.Random(7)
    of = runtime(name, attention)
    for choice in ([FULL, FIXED[0], FIXED[1]], [FULL, FIXED[6], *plans_of(rng, 2)]):
        row, kept, found = row_of(rng, 2 * WINDOW + 2), Cache(1, 1), []
        plans: list[Plan] = []
        for part in chunks(rng, [row], least=1, most=4):
            plan = rng.choice(choice)
            found += feed(of, part, [plan], kept)
            plans += [plan] * len(part[0])
        close(torch.cat(found), slow_walk(name, of.backbone.model, row, plans))


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_rows_that_change_plans_in_a_batch_equal_rows_alone(name: str, attention: str) -> None:
    rng = random.Random(9)
    of = runtime(name, attention)
    rows = [row_of(rng, tokens) for tokens in (2 * WINDOW, 3, 3 * WINDOW)]
    together, apart = Cache(3, 1), [Cache(1, 1) for _ in rows]
    for part in chunks(rng, rows, most=4):
        plans = [rng.choice((FULL, *FIXED)) for _ in rows]
        for row, plan, kept, found in zip(part, plans, apart, feed(of, part, plans, together), strict=True):
            close(found, feed(of, [row], [plan], kept)[0])


@EVERY_ARCHITECTURE
def test_any_history_of_passes_rollbacks_and_selections_equals_the_slow_walk(name: str) -> None:
    rng = random.Random(10)
    of = runtime(name)
    choice = [FULL, *FIXED[:5], *plans_of(rng, 2)]
    kept = Cache(3, 1)
    rows: list[list[tuple[int, Plan, Tensor]]] = [[], [], []]
    for _ in range(30):
        action = rng.choice(("pass", "pass", "pass", "rollback", "select"))
        if action == "select":
            chosen = [rng.randrange(len(rows)) for _ in range(rng.choice((2, 3, 3, 4)))]
            rows = [list(rows[row]) for row in chosen]
            kept.select(chosen)
        elif action == "rollback":
            rows = [row[: rng.randint(len(row) * 2 // 3, len(row))] for row in rows]
            kept.rollback([len(row) for row in rows])
        else:
            part = [row_of(rng, rng.choice((0, 1, 1, 2, 4))) for _ in rows]
            plans = [rng.choice(choice) for _ in rows]
            for row, tokens, plan, logits in zip(rows, part, plans, feed(of, part, plans, kept), strict=True):
                row += [(token, plan, at) for token, at in zip(tokens, logits, strict=True)]
        assert kept.lengths == [len(row) for row in rows]
    assert sum(map(len, rows)) > 2 * WINDOW
    for row in filter(None, rows):
        tokens, plans, found = map(list, zip(*row, strict=True))
        close(torch.stack(found), slow_walk(name, of.backbone.model, tokens, plans))


# -- rollback ------------------------------------------------------------------------------------------------


def held(store: SlotStore, row: int) -> list[int]:
    """The tokens of `row` that a slot shows to later ones."""
    if store.seen is None:
        return list(range(store.ends[row]))
    return torch.nonzero(store.seen[row]).flatten().tolist()


def same_content(found: Cache, expected: Cache, same: Law) -> None:
    """Both caches show the same tokens, with the same keys and values, in every slot."""
    assert found.lengths == expected.lengths
    for slot in found.slots.keys() | expected.slots.keys():
        for row in range(expected.rows):
            one, other = (c.slots.get(slot) for c in (found, expected))
            tokens = held(other, row) if other else []
            assert (held(one, row) if one else []) == tokens
            if tokens:
                assert tokens[-1] < expected.lengths[row]
                same(one.keys[row][:, tokens], other.keys[row][:, tokens])
                same(one.values[row][:, tokens], other.values[row][:, tokens])


def rollback_law(
    of: Runtime, plans: Sequence[Plan], wrong: Sequence[Plan], rows: slice = slice(3), same: Law = exact
) -> None:
    """Of three rows (or those in `rows`) one goes back to 0, one to where a pass ended, one stays; and all go on."""
    rng = random.Random(11)
    plans, wrong = plans[rows], wrong[rows]
    clean, spoilt = (Cache(len(plans), 1) for _ in range(2))
    for lengths in ((0, 4, 9), (0, 0, 1)):
        part = [row_of(rng, tokens) for tokens in lengths[rows]]
        for kept in (clean, spoilt):
            feed(of, part, plans, kept)
    for at, lengths in enumerate(((6, 3, 0), (1, 2, 0), (60, 7, 0))):  # the last makes the cache grow
        feed(of, [row_of(rng, tokens) for tokens in lengths[rows]], wrong if at % 2 else plans, spoilt)
    spoilt.rollback(clean.lengths)
    same_content(spoilt, clean, same)
    for lengths in ((3, 1, 0), (1, 1, 1), (2, 8, 4), (0, 3, 1)):
        part = [row_of(rng, tokens) for tokens in lengths[rows]]
        for found, expected in zip(feed(of, part, plans, spoilt), feed(of, part, plans, clean), strict=True):
            same(found, expected)
        same_content(spoilt, clean, same)


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_after_a_rollback_nothing_tells_that_the_tokens_were_there(name: str, attention: str) -> None:
    for plans in (plans_of(random.Random(12), 3), [FULL, FIXED[0], FIXED[2]]):
        rollback_law(runtime(name, attention), plans, plans)
    for row in (slice(0, 1), slice(1, 2)):
        rollback_law(runtime(name, attention), [FIXED[0], FULL], [FIXED[0], FULL], row)


@EVERY_MODEL
@EVERY_ARCHITECTURE
def test_after_a_rollback_nothing_tells_that_other_plans_were_there(name: str, attention: str) -> None:
    of = runtime(name, attention)
    rollback_law(of, [FULL, FIXED[0], FIXED[2]], FIXED[1:4])
    rollback_law(of, plans_of(random.Random(13), 3), FIXED[:3])
    # Alone, a slot that once had a hole keeps a mask, where a clean one needs none: other kernels round differently.
    for row in (slice(0, 1), slice(1, 2)):
        rollback_law(of, [FULL, FULL], [FIXED[1], FIXED[1]], row, close)


@pytest.mark.parametrize("lengths", [[4, 2], [3, 3], [-1, 2], [3], [3, 2, 0], -1, 3])
def test_a_rollback_to_what_is_not_stored_is_refused(lengths: list[int] | int) -> None:
    of, kept = runtime("llama"), Cache(2, 1)
    feed(of, [[3, 4, 5], [6, 7]], [FULL] * 2, kept)
    with pytest.raises(ValueError, match="cannot roll"):
        kept.rollback(lengths)
    assert kept.lengths == [3, 2]
    kept.rollback(1)
    assert kept.lengths == [1, 1]


# -- the cache -----------------------------------------------------------------------------------------------


@EVERY_ARCHITECTURE
def test_selected_rows_go_on_as_the_rows_they_were(name: str) -> None:
    rng = random.Random(14)
    of = runtime(name)
    for chosen in ([2, 0, 1], [1, 1, 0, 2, 1], [1], [2, 0]):
        rows, plans, kept = [row_of(rng, tokens) for tokens in (3, 9, 5)], plans_of(rng, 3), Cache(3, 1)
        feed(of, rows, plans, kept)
        kept.select(chosen)
        more = [row_of(rng, WINDOW) for _ in chosen]
        found = feed_in_chunks(of, more, [plans[row] for row in chosen], kept, rng)
        for row, added, logits in zip(chosen, more, found, strict=True):
            close(logits, alone(of, rows[row] + added, plans[row])[-WINDOW:])
        assert kept.lengths == [len(rows[row]) + WINDOW for row in chosen]


@EVERY_ARCHITECTURE
def test_growing_changes_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = runtime(name)
    large = Cache(3, 500)
    monkeypatch.setattr(cache_module, "ALIGNMENT", 1)
    rng, small, capacities = random.Random(15), Cache(3, 1), set()
    for part in chunks(rng, [row_of(rng, tokens) for tokens in (30, 9, 21)], most=4):
        plans = [rng.choice(FIXED[:5]) for _ in part]  # holes grow too
        for found, expected in zip(feed(of, part, plans, small), feed(of, part, plans, large), strict=True):
            exact(found, expected)
        capacities.add(small.capacity)
    assert len(capacities) > 3
    same_content(small, large, exact)


@EVERY_ARCHITECTURE
def test_bytes_are_allocated_for_visited_slots_alone(name: str) -> None:
    of = runtime(name)
    heads = [layer.self_attn.k_proj.out_features for layer in of.backbone.layers]
    for plan in [FULL, *FIXED]:
        kept = Cache(2, 64)
        assert kept.nbytes == 0
        feed(of, [[3, 4], [5]], [plan, plan.only(Part.MLP, *range(3))], kept)
        assert set(kept.slots) == set(filter(None, plan.slots))
        assert kept.nbytes == sum(2 * 2 * 64 * heads[visit.layer] * 4 for visit in plan if visit.attends)


# -- what runs -----------------------------------------------------------------------------------------------


@EVERY_ARCHITECTURE
def test_what_a_plan_leaves_out_is_not_run_and_the_trace_says_what_was(name: str) -> None:
    of, rng = Runtime(Backbone(model(name))), random.Random(16)
    ran: Counter[tuple[int, str]] = Counter()  # rows that went through each module
    calls: Counter[str] = Counter()

    def count(module: nn.Module, number: int, part: str) -> None:
        def hook(_: nn.Module, given: tuple[Tensor, ...], options: dict[str, Tensor], out: object) -> None:
            ran[number, part] += len(given[0] if given else options["hidden_states"])
            calls[part] += 1

        module.register_forward_hook(hook, with_kwargs=True)

    for number, layer in enumerate(of.backbone.layers):
        for part, module in (("layer", layer), ("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            count(module, number, part)
    for plans in (plans_of(rng, 1), plans_of(rng, 2), plans_of(rng, 4), plans_of(rng, 1) * 3, FIXED[4:7]):
        kept, trace, tokens = Cache(len(plans), 1), Trace(), Counter()
        expected: Counter[tuple[int, str]] = Counter()
        ran.clear()
        calls.clear()
        for counts in ((2, 1, 2, 1), (1, 0, 1, 0), (1, 1, 1, 1), (0, 0, 3, 0), (0, 0, 0, 0)):
            feed(of, [row_of(rng, count) for count, _ in zip(counts, plans, strict=False)], plans, kept, trace)
            for row, (plan, count) in enumerate(zip(plans, counts, strict=False)):
                tokens[row] += count
                for visit in plan if count else ():
                    expected[visit.layer, "layer"] += 1
                    expected[visit.layer, "self_attn"] += visit.part is not Part.MLP
                    expected[visit.layer, "mlp"] += visit.part is not Part.ATTENTION
        assert ran == expected
        assert trace.calls == calls["layer"]
        assert [list(trace.plans(row, Phase.PREFILL)) for row in range(len(plans))] == [
            [plan] * tokens[row] for row, plan in enumerate(plans)
        ]


# -- gradients -----------------------------------------------------------------------------------------------


def gradients(of: Runtime, rows: Sequence[Row], plans: Sequence[Plan], of_rows: Sequence[int]) -> dict[str, Tensor]:
    """The gradient of a sum over the logits of some rows, by parameter of the layers; zeros where none arrived."""
    weights = dict(of.backbone.layers.named_parameters())
    with torch.enable_grad():
        logits = feed(of, rows, plans)
        loss = torch.stack([logits[row].sin().sum() for row in of_rows]).sum()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def reached(found: dict[str, Tensor]) -> set[tuple[int, str]]:
    """Layers and branches whose matrices got a gradient: all matrices of the branch, or none."""
    some, none = set(), set()
    for key, gradient in found.items():
        number, branch, *_ = key.split(".")
        if branch in ("self_attn", "mlp") and gradient.dim() == 2:
            (some if gradient.any() else none).add((int(number), branch))
    assert not some & none
    return some


@EVERY_ARCHITECTURE
def test_gradients_reach_what_was_visited_and_nothing_else(name: str) -> None:
    of, rng = runtime(name), random.Random(17)
    for plans in (plans_of(rng, 1), FIXED[4:5], plans_of(rng, 3), FIXED[2:5]):
        rows = [row_of(rng, tokens) for tokens in (WINDOW + 2, 4, 6)][: len(plans)]
        apart = []
        for at, plan in enumerate(plans):
            expected = {(v.layer, "self_attn") for v in plan if v.part is not Part.MLP}
            expected |= {(v.layer, "mlp") for v in plan if v.part is not Part.ATTENTION}
            apart.append(gradients(of, [rows[at]], [plan], [0]))
            assert reached(apart[-1]) == reached(gradients(of, rows, plans, [at])) == expected
        for key, found in gradients(of, rows, plans, range(len(rows))).items():
            total = torch.stack([one[key] for one in apart]).sum(0)
            torch.testing.assert_close(found, total, atol=1e-4 * (1 + total.abs().max().item()), rtol=1e-3)
