"""The law of costs: what the formulas say is what a counter inside torch counts, and what the modules weigh."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, LAYERS, VOCABULARY, model, random_plan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from layerwise.cost import (
    Cost,
    LayerShape,
    ModelShape,
    decode_cost,
    ideal_speedup,
    pass_cost,
    prefill_cost,
)
from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache
from layerwise.model.runtime import Runtime
from layerwise.plan import Part, Plan

# torch 2.13's counter knows the matrix products that eager attention makes (aten.bmm), and scaled_dot_product_attention
# where it runs a CUDA kernel. On a CPU that is aten._scaled_dot_product_flash_attention_for_cpu, which has no entry:
# the counter takes sdpa for 0 FLOPs. So eager attention is the witness that needs no help, and sdpa is counted with
# the entry below, which hands the CPU kernel to torch's own formula.
_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


COUNTABLE = [(name, attention) for name in ARCHITECTURES for attention in ("eager", "sdpa")]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def backbone(name: str, attention: str = "eager") -> Backbone:
    """A backbone that has already run: the tables of the rotary embedding are made once, with counted products."""
    made = Backbone(model(name, attention=attention))
    Runtime(made).forward(embedded(made, 1, 1), [Plan.full(LAYERS)])
    return made


def embedded(of: Backbone, rows: int, tokens: int) -> Tensor:
    return of.embedding(torch.randint(3, VOCABULARY, (rows, tokens)))


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={_CPU_KERNEL: _cpu_flash}) as counter:
        run()
    return counter.get_total_flops()


def run_pass(
    of: Backbone, plans: Sequence[Plan], tokens: int, kept: Cache | None = None, head_tokens: int | None = None
) -> Callable[[], None]:
    """A pass of one plan per row, and the logits of its last `head_tokens` positions (all if None)."""
    inputs = embedded(of, len(plans), tokens)

    def run() -> None:
        hidden = Runtime(of).forward(inputs, plans, cache=kept)
        if head_tokens != 0:
            of.logits(hidden if head_tokens is None else hidden[:, -head_tokens:])

    return run


def random_plans(seed: int, number: int) -> list[Plan]:
    rng = random.Random(seed)
    return [random_plan(rng) for _ in range(number)]


def shape(name: str) -> ModelShape:
    return backbone(name).shape


# -- FLOPs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), COUNTABLE)
def test_flops_of_an_uncached_prefill_are_those_counted(name: str, attention: str) -> None:
    of = backbone(name, attention)
    for tokens, plan in zip((1, 2, 5, 11, 23), [Plan.full(LAYERS), *random_plans(0, 4)], strict=True):
        assert counted(run_pass(of, [plan], tokens)) == pass_cost(of.shape, plan, tokens).flops


@pytest.mark.parametrize(("name", "attention"), COUNTABLE)
def test_flops_of_a_cached_decoding_step_are_those_counted(name: str, attention: str) -> None:
    of = backbone(name, attention)
    for context, plan in zip((1, 9, 20), [Plan.full(LAYERS), *random_plans(1, 2)], strict=True):
        kept = Cache(1, 1)
        run_pass(of, [plan], context, kept)()
        for step in range(2):
            assert counted(run_pass(of, [plan], 1, kept)) == pass_cost(of.shape, plan, 1, context + step).flops


@pytest.mark.parametrize(("name", "attention"), COUNTABLE)
def test_flops_of_a_cached_block_are_those_counted(name: str, attention: str) -> None:
    of = backbone(name, attention)
    for plan in random_plans(2, 2):
        kept = Cache(1, 1)
        run_pass(of, [plan], 9, kept)()
        assert counted(run_pass(of, [plan], 4, kept)) == pass_cost(of.shape, plan, 4, context=9).flops


@pytest.mark.parametrize(("name", "attention"), COUNTABLE)
def test_flops_of_two_rows_with_one_plan_are_those_counted(name: str, attention: str) -> None:
    of = backbone(name, attention)
    for plan in random_plans(3, 2):
        kept = Cache(2, 1)
        assert counted(run_pass(of, [plan, plan], 8, kept)) == pass_cost(of.shape, plan, 8, rows=2).flops
        assert counted(run_pass(of, [plan, plan], 1, kept)) == pass_cost(of.shape, plan, 1, 8, rows=2).flops


@pytest.mark.parametrize(("name", "attention"), COUNTABLE)
def test_flops_of_two_plans_in_a_batch_are_their_sum(name: str, attention: str) -> None:
    of = backbone(name, attention)
    plans = random_plans(4, 4)
    for pair in (plans[:2], plans[2:]):
        kept = Cache(2, 1)
        for tokens, context in ((8, 0), (1, 8)):
            expected = sum((pass_cost(of.shape, plan, tokens, context) for plan in pair), Cost()).flops
            assert counted(run_pass(of, pair, tokens, kept)) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_with_some_or_no_head_are_those_counted(name: str) -> None:
    of = backbone(name)
    for plan in random_plans(5, 3):
        for head_tokens in (0, 1, 3):
            expected = pass_cost(of.shape, plan, 7, head_tokens=head_tokens).flops
            assert counted(run_pass(of, [plan], 7, head_tokens=head_tokens)) == expected
        assert prefill_cost(of.shape, plan, 7) == pass_cost(of.shape, plan, 7, head_tokens=1)


def test_the_counter_sees_each_part() -> None:
    """Guards the witness: a counter that saw nothing of a part would agree with a formula that forgot it."""
    of = backbone("llama")
    whole, attention, mlp = (counted(run_pass(of, [Plan.parse(t)], 5, head_tokens=0)) for t in ("3", "3a", "3m"))
    head = counted(run_pass(of, [Plan.parse("3m")], 5)) - mlp
    assert mlp == 2 * 5 * 3 * 32 * 48
    assert attention == 2 * 5 * (32 * 32 * 2 + 32 * 16 * 2) + 4 * 32 * 5 * 5
    assert head == 2 * 5 * 32 * VOCABULARY
    assert whole == attention + mlp


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weight_bytes_of_the_full_plan_are_those_of_the_modules(name: str, dtype: torch.dtype) -> None:
    """All parameters of layers and head, and one row of the embedding; the final norm's few are not counted."""
    of = Backbone(model(name).to(dtype))
    layers = sum(parameter.nbytes for layer in of.layers for parameter in layer.parameters())
    head = sum(parameter.nbytes for parameter in of.head.parameters())
    expected = layers + head + of.embedding.weight[0].nbytes
    assert pass_cost(of.shape, Plan.full(LAYERS), 1).weight_bytes == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_read_once_per_visit_not_per_row_or_token(name: str) -> None:
    of = backbone(name)
    layer = sum(parameter.nbytes for parameter in of.layers[3].parameters())
    row = of.embedding.weight[0].nbytes
    full = pass_cost(of.shape, Plan.full(LAYERS), 1).weight_bytes
    assert pass_cost(of.shape, Plan.full(LAYERS).repeat(3, times=3), 1).weight_bytes == full + 2 * layer
    assert pass_cost(of.shape, Plan.full(LAYERS).skip(3), 1).weight_bytes == full - layer
    assert pass_cost(of.shape, Plan.full(LAYERS), 5, rows=4).weight_bytes == full + 19 * row


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cache_bytes_of_a_prefill_are_twice_what_the_cache_holds(name: str) -> None:
    of = backbone(name)
    for plan in [Plan.full(LAYERS), *random_plans(6, 3)]:
        kept = Cache(2, 64)  # filled to its capacity, so that all it has allocated is in use
        run_pass(of, [plan, plan], 64, kept, head_tokens=0)()
        assert pass_cost(of.shape, plan, 64, rows=2).cache_bytes == 2 * kept.nbytes  # written, and read


def test_a_decoding_step_reads_the_whole_cache_and_writes_one_token() -> None:
    sizes = shape("llama")
    token = pass_cost(sizes, Plan.full(LAYERS), 1).cache_bytes // 2  # without context: one written, one read
    assert pass_cost(sizes, Plan.full(LAYERS), 1, context=40).cache_bytes == 42 * token
    assert pass_cost(sizes, Plan.full(LAYERS).only(Part.MLP, *range(LAYERS)), 1, context=40).cache_bytes == 0


# -- sums and bounds -----------------------------------------------------------------------------------------


def test_costs_add() -> None:
    total = Cost(1, 20, 300) + Cost(4, 50, 600)
    assert total == Cost(5, 70, 900)
    assert total.bytes == 970
    assert Cost() + total == total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_halves_of_a_layer_make_the_whole(name: str) -> None:
    sizes = shape(name)
    whole, attention, mlp = (pass_cost(sizes, Plan.parse(text), 5, 9, 0) for text in ("0-5", "0-5a", "0-5m"))
    assert whole.flops == attention.flops + mlp.flops
    assert whole.cache_bytes == attention.cache_bytes
    assert whole.weight_bytes <= attention.weight_bytes + mlp.weight_bytes
    assert max(attention.weight_bytes, mlp.weight_bytes) < whole.weight_bytes


def test_no_head_tokens_leave_out_the_head() -> None:
    of = backbone("llama")
    for plan in random_plans(7, 5):
        whole, bare = pass_cost(of.shape, plan, 5, 3), pass_cost(of.shape, plan, 5, 3, head_tokens=0)
        assert whole.flops - bare.flops == 2 * 5 * of.head.weight.numel()
        assert whole.weight_bytes - bare.weight_bytes == of.head.weight.nbytes
        assert whole.cache_bytes == bare.cache_bytes


def test_decoding_costs_the_sum_of_its_steps() -> None:
    for plan in random_plans(8, 10):
        for steps in (0, 1, 2, 17):
            single = [pass_cost(shape("qwen2"), plan, 1, context=12 + step) for step in range(steps)]
            assert decode_cost(shape("qwen2"), plan, 12, steps) == sum(single, Cost())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_layers_never_beats_their_share(name: str) -> None:
    rng = random.Random(9)
    full = Plan.full(LAYERS)
    assert ideal_speedup(shape(name), full, 10) == 1.0
    for removed in range(1, LAYERS):
        for context in (0, 1, 100, 100_000):
            speedup = ideal_speedup(shape(name), full.skip(*rng.sample(range(LAYERS), removed)), context)
            assert 1.0 < speedup < LAYERS / (LAYERS - removed)  # the head stays: the share is never reached


def test_a_larger_vocabulary_saves_less() -> None:
    layers = (LayerShape(4_000, 12_000, 100, 64, 32),) * 30
    plan = Plan.full(30).skip(*range(10, 20))
    speedups = [ideal_speedup(ModelShape(layers, 64, size, 2), plan, 50) for size in (1, 1_000, 50_000)]
    assert 30 / 20 > speedups[0] > speedups[1] > speedups[2] > 1.0
