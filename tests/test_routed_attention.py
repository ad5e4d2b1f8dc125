"""Routed attention: causal, equal to its slow reference, equal with a cache and in a batch, and it really skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import one_line
from torch import Tensor
from torch.nn import functional as F

from layerwise.benchmarks.routed_attention import bench_routed_attention, forward_cost, spread
from layerwise.model import routed_attention, scoring
from layerwise.model.filters import causal_filter, moving_average
from layerwise.model.recall_model import RecallModel, RecallModelConfig, RoutedLayerCache
from layerwise.model.routed_attention import RoutedAttention

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def layer(**options: object) -> RoutedAttention:
    torch.manual_seed(0)
    given = {"hidden_size": 16, "heads": 4, "kernel_size": 5, **options}
    made = RoutedAttention(**given).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def model(**options: object) -> RecallModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "kernel_size": 5}
    made = RecallModel(RecallModelConfig(**{**sizes, **options})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def ids(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randint(40, (rows, width), generator=torch.Generator().manual_seed(seed))


class Counter:
    """Counts the query rows that are scored, and keys times queries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queries = self.products = 0
        usual = F.scaled_dot_product_attention

        def counting(queries: Tensor, keys: Tensor, *rest: object, **options: object) -> Tensor:
            self.queries += queries.shape[0] * queries.shape[2]
            self.products += queries.shape[0] * queries.shape[2] * keys.shape[2]
            return usual(queries, keys, *rest, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counting)


# -- filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 64, 150])
def test_causal_filter_is_a_depthwise_convolution(width: int) -> None:
    taps, values = torch.rand(4, 9), torch.randn(2, 8 + width, 12)
    weight = taps.repeat_interleave(3, 0).flip(-1)[:, None]
    expected = F.conv1d(values.transpose(1, 2), weight, groups=12).transpose(1, 2)
    torch.testing.assert_close(causal_filter(values, taps), expected, **CLOSE)


@pytest.mark.parametrize("width", [1, 5, 64, 200])
@pytest.mark.parametrize("goes_on", [False, True])
def test_moving_average_is_the_recursion(width: int, goes_on: bool) -> None:
    values, before = torch.randn(2, width, 3), torch.randn(2, 3) if goes_on else None
    state, expected = torch.zeros(2, 3) if before is None else before, []
    for step in range(width):
        state = 0.9 * state + 0.1 * values[:, step]
        expected.append(state)
    torch.testing.assert_close(moving_average(values, 0.9, before), torch.stack(expected, 1), **CLOSE)


# -- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kernel", ["auto", "dense", "gathered", "chunked"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_fast_path_equals_the_reference(usage: float, kernel: str, padding: str, rotary: bool) -> None:
    mix = layer(rope_theta=100.0 if rotary else None, kv_heads=2)
    mix.kernel, mix.chunk = kernel, 16
    hidden = torch.randn(3, 70, 16)
    gate = torch.rand(3, 70) < usage
    mask = None
    if padding != "none":
        mask = torch.arange(70)[None] >= torch.tensor([[0], [9], [40]])
        mask = mask.flip(1) if padding == "right" else mask
    with torch.no_grad():
        fast, routing = mix(hidden, mask, gate=gate)
        slow, _ = mix.reference(hidden, mask, gate=gate)
        if mask is not None:
            assert not routing.gate[~mask].any()
            fast, slow = fast[mask], slow[mask]
        torch.testing.assert_close(fast, slow, **CLOSE)


@pytest.mark.parametrize("usage", [0.0, 0.1, 0.8])
@pytest.mark.parametrize("padded", [False, True])
def test_a_long_text_in_blocks_equals_the_reference(
    usage: float, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and after other positions in a cache of which the last all attended."""
    monkeypatch.setattr(routed_attention, "BLOCK", 16)
    monkeypatch.setattr(scoring, "_COMMON", 1)  # what all queries of a chunk see is scored apart
    mix, hidden = layer(), torch.randn(2, 70, 16)
    gate = torch.rand(2, 70) < usage
    gate[:, 8:10] = True
    mask = torch.arange(70)[None] >= torch.tensor([[0], [25]]) if padded else None
    with torch.no_grad():
        slow, _ = mix.reference(hidden, mask, gate=gate)
        fast, _ = mix(hidden, mask, gate=gate)
        cache, parts = RoutedLayerCache(), []
        for part in (slice(0, 8), slice(8, 10), slice(10, 70)):
            parts.append(mix(hidden[:, part], None if mask is None else mask[:, part], cache, gate[:, part])[0])
    for found in (fast, torch.cat(parts, dim=1)):
        seen = slice(None) if mask is None else mask
        torch.testing.assert_close(found[seen], slow[seen], **CLOSE)


def test_the_router_decides_in_inference_and_equals_the_reference() -> None:
    mix, hidden = layer(), torch.randn(2, 90, 16)
    with torch.no_grad():
        fast, routing = mix(hidden)
        assert 0 < routing.gate.mean() < 1
        assert torch.equal(routing.gate > 0, routing.logits > 0)
        torch.testing.assert_close(fast, mix.reference(hidden)[0], **CLOSE)


@pytest.mark.parametrize("mixing", ["routed", "attention", "convolution"])
def test_causality(mixing: str) -> None:
    made, tokens = model(mixing=mixing), ids(1, 80)
    with torch.no_grad():
        before = made(tokens)
        for at in (3, 40, 78):
            changed = tokens.clone()
            changed[0, at + 1 :] = (changed[0, at + 1 :] + 7) % 40
            after = made(changed)
            torch.testing.assert_close(after.logits[:, : at + 1], before.logits[:, : at + 1], **CLOSE)
            assert torch.equal(after.gates[:, :, : at + 1], before.gates[:, :, : at + 1])
            assert not torch.allclose(after.logits[:, at + 1], before.logits[:, at + 1])


def test_positions_that_do_not_attend_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    mix, hidden, gate = layer(), torch.randn(2, 100, 16), torch.zeros(2, 100)
    count, made = Counter(monkeypatch), []
    mix.k_proj.register_forward_hook(lambda _module, given, _out: made.append(given[0].shape[1]))
    with torch.no_grad():
        mix(hidden, gate=gate)
        assert count.queries == 0 and made == []  # nobody attends: no keys either
        gate[0, [10, 60]] = 1
        mix(hidden, gate=gate)
        assert count.queries == 2 and made == [61] and count.products <= 2 * 61
        mix(hidden, gate=torch.ones(2, 100))
        assert count.queries == 2 + 200


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [True, False])
def test_gradients_reach_the_router(blend: bool) -> None:
    mix = layer().train()
    mix.blend = blend
    output, routing = mix(torch.randn(2, 60, 16))
    assert set(routing.gate.detach().unique().tolist()) <= {0.0, 1.0}
    output.square().sum().backward()
    for name, parameter in mix.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gathered_training_pass_equals_the_blended_one() -> None:
    mix, hidden = layer().train(), torch.randn(2, 60, 16)
    outputs = []
    for mix.blend in (True, False):
        torch.manual_seed(3)
        outputs.append(mix(hidden)[0])
    torch.testing.assert_close(*outputs, **CLOSE)


# -- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rope_theta": 100.0}, {"mixing": "attention"}, {"mixing": "convolution"}])
def test_cached_equals_uncached(options: dict[str, object]) -> None:
    made, tokens = model(**options), ids(2, 60)
    with torch.no_grad():
        whole = made(tokens)
        cache, parts, gates = None, [], []
        for start, end in ((0, 20), (20, 21), (21, 45), *((at, at + 1) for at in range(45, 60))):
            output = made(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
            gates.append(output.gates)
        torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **CLOSE)
        assert torch.equal(torch.cat(gates, 2), whole.gates)
        assert cache.get_seq_length() == 60


def test_cached_with_forced_gates_equals_uncached() -> None:
    """All attend for longer than the convolution's window, then nobody, then some."""
    made, tokens = model(), ids(2, 60)
    gates = torch.zeros(3, 2, 60)
    gates[:, :, 10:30] = 1
    gates[:, 0, 40:] = torch.rand(3, 20).round()
    with torch.no_grad():
        whole = made(tokens, gates=gates).logits
        cache, parts = None, []
        for at in range(60):
            output = made(tokens[:, at : at + 1], past_key_values=cache, use_cache=True, gates=gates[:, :, at : at + 1])
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "heads": 2},
        {"hidden_size": 48, "heads": 4, "kv_heads": 2, "kernel_size": 19},  # no multiples of what is done at once
        {"hidden_size": 20, "heads": 2},
    ],
)
def test_operators_for_single_tokens_equal_the_usual_way(
    sizes: dict[str, int], rotary: bool, dtype: torch.dtype
) -> None:
    """Through prompts, runs of attending tokens longer than the window, snapshots and the router's own choices."""
    sizes = {**sizes, "router_width": 6, "rope_theta": 50.0 if rotary else None}
    size = sizes["hidden_size"]
    usual, fast = layer(**sizes).to(dtype), layer(**sizes).to(dtype)
    assert fast.prepare() and not usual.prepared
    close = CLOSE if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    gates = [0, 1, 0, 0, *[1] * 22, 0, 1, *[0] * 14, 1, *[None] * 12, 0]
    with torch.no_grad():
        for prompt in (0, 3, 40):
            caches = [RoutedLayerCache(), RoutedLayerCache()]
            if prompt:
                first = torch.randn(1, prompt, size, dtype=dtype)
                for mix, cache in zip((usual, fast), caches, strict=True):
                    mix(first, cache=cache)
            tokens = torch.randn(len(gates), 1, 1, size, dtype=dtype)
            state = caches[1].snapshot()
            for number, (token, gate) in enumerate([*zip(tokens, gates, strict=True)] * 2):
                if number == len(gates):  # once more, from a snapshot
                    caches[0] = RoutedLayerCache()
                    if prompt:
                        usual(first, cache=caches[0])
                    caches[1].restore(state)
                given = None if gate is None else torch.full((1, 1), float(gate), dtype=dtype)
                expected, said = usual(token, cache=caches[0], gate=given)
                found, routing = fast(token, cache=caches[1], gate=given if dtype == torch.float32 else said.gate)
                torch.testing.assert_close(found, expected, **close)
                torch.testing.assert_close(routing.logits, said.logits, **close)
                assert torch.equal(routing.gate, said.gate)


def test_operators_see_weights_written_to_and_cast_after_prepare() -> None:
    sizes = {"hidden_size": 64, "heads": 2, "router_width": 6}
    usual, fast = layer(**sizes), layer(**sizes)
    assert fast.prepare()
    token, gate = torch.randn(1, 1, 64), torch.zeros(1, 1, dtype=torch.bool)
    with torch.no_grad():
        fast(token, cache=RoutedLayerCache(), gate=gate)
        for mix in (usual, fast):
            for parameter in mix.parameters():
                parameter *= 0.5
            mix.to(torch.bfloat16)
        found, routing = fast(token.bfloat16(), cache=RoutedLayerCache(), gate=gate)
        expected, said = usual(token.bfloat16(), cache=RoutedLayerCache(), gate=gate)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=1e-2)
    torch.testing.assert_close(routing.logits, said.logits, rtol=5e-2, atol=1e-2)


def test_full_attention_by_the_fused_kernel_equals_ours() -> None:
    """What the benchmark compares with is the same attention."""
    sizes = {"hidden_size": 64, "heads": 2}
    ours, fused = layer(**sizes), layer(**sizes)
    fused.fused, caches = True, [RoutedLayerCache(), RoutedLayerCache()]
    for mix in (ours, fused):
        assert mix.prepare()
        mix.mixing = "attention"
    with torch.no_grad():
        for token in torch.randn(90, 1, 1, 64):
            found, expected = (mix(token, cache=cache)[0] for mix, cache in zip((ours, fused), caches, strict=True))
            torch.testing.assert_close(found, expected, **CLOSE)


def test_several_tokens_after_a_single_first_one() -> None:
    """The operators' window then holds less than the convolution reaches."""
    mix, hidden = layer(hidden_size=64, heads=2), torch.randn(1, 4, 64)
    assert mix.prepare()
    gate = torch.zeros(1, 4)
    with torch.no_grad():
        cache = RoutedLayerCache()
        parts = [mix(hidden[:, part], cache=cache, gate=gate[:, part])[0] for part in (slice(0, 1), slice(1, 4))]
        torch.testing.assert_close(torch.cat(parts, dim=1), mix.reference(hidden, gate=gate)[0], **CLOSE)


def test_a_decoded_token_that_is_not_routed_costs_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokens = model(), ids(2, 12)
    with torch.no_grad():
        cache = made(tokens, use_cache=True, gates=torch.ones(3, 2, 12)).past_key_values
        count = Counter(monkeypatch)
        gates = torch.zeros(3, 2, 1)
        made(tokens[:, :1], past_key_values=cache, gates=gates)
        assert count.queries == 0 and all(one.made == 12 and one.length == 13 for one in cache.layers)
        gates[1, 0] = 1
        made(tokens[:, :1], past_key_values=cache, gates=gates)
        assert count.queries == 1 and count.products == 14  # one row of the two
        assert [one.made for one in cache.layers] == [12, 14, 12]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_single_rows(side: str, rotary: bool) -> None:
    made, lengths = model(rope_theta=100.0 if rotary else None), (30, 13, 4)
    tokens, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for row, length in enumerate(lengths):
        part = slice(30 - length, 30) if side == "left" else slice(0, length)
        tokens[row, part], mask[row, part] = ids(1, length, row)[0], 1
    with torch.no_grad():
        batch = made(tokens, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = made(ids(1, length, row))
            torch.testing.assert_close(batch.logits[row][mask[row].bool()], alone.logits[0], **CLOSE)
            assert torch.equal(batch.gates[:, row, mask[row].bool()], alone.gates[:, 0])


def test_generate_with_cache_in_a_batch_equals_without() -> None:
    made = model()
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = made.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, made.generate(tokens, attention_mask=mask, use_cache=False, **options))
    alone = made.generate(tokens[1:, 8:], attention_mask=mask[1:, 8:], **options)
    assert torch.equal(cached[1, 20:], alone[0, 12:])
    beams = {**options, "num_beams": 3}
    assert torch.equal(
        made.generate(tokens, attention_mask=mask, **beams),
        made.generate(tokens, attention_mask=mask, use_cache=False, **beams),
    )


def test_generate_decodes_by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = model(hidden_size=64, num_attention_heads=2), []
    usual = RoutedAttention._decode
    monkeypatch.setattr(RoutedAttention, "_decode", lambda *given: calls.append(given[0]) or usual(*given))
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    cached = made.generate(ids(1, 20), **options)
    assert len(calls) == 29 * len(made.layers)  # the first token is the prompt's
    assert torch.equal(cached, made.generate(ids(1, 20), use_cache=False, **options))
    assert len(calls) == 29 * len(made.layers)


def test_a_cache_goes_back_to_a_snapshot() -> None:
    made, tokens = model(), ids(1, 40)
    with torch.no_grad():
        cache = made(tokens[:, :20], use_cache=True).past_key_values
        states = [one.snapshot() for one in cache.layers]
        expected = made(tokens[:, 20:30], past_key_values=cache).logits
        made(tokens[:, 30:], past_key_values=cache)
        for one, state in zip(cache.layers, states, strict=True):
            one.restore(state)
        assert cache.get_seq_length() == 20
        assert torch.equal(made(tokens[:, 20:30], past_key_values=cache).logits, expected)


def test_save_and_load(tmp_path: Path) -> None:
    made, tokens = model(router_width=6, rope_theta=50.0), ids(2, 30)
    made.save_pretrained(tmp_path)
    again = RecallModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(made(tokens).logits, again(tokens).logits)
    assert again.config.router_width == 6


def test_the_original_sizes() -> None:
    assert sum(p.numel() for p in RecallModel(RecallModelConfig()).parameters()) == pytest.approx(1.12e6, rel=0.01)


def test_the_benchmark_reports_every_point() -> None:
    result = bench_routed_attention((16, 40), (0.1, 1.0), rounds=1, hidden_size=16, heads=2, decoded=10, memory=False)
    points = result["points"]
    assert len(points) == 2 * 2 * 2
    assert {(one["length"], one["phase"], round(one["usage"], 1)) for one in points} == {
        (length, phase, usage) for length in (16, 40) for phase in ("forward", "decode") for usage in (0.1, 1.0)
    }
    for one in points:
        assert one["realised"] == pytest.approx(one["measured"] / one["ideal"]) and one["bound"] >= one["ideal"]
        assert one["measured"] == pytest.approx(one["full_seconds"] / one["seconds"])
        assert ("kernels" in one) == (one["phase"] == "forward")
    one_line(lambda: bench_routed_attention((16,), (1.5,)), "usages")
    for size in ({"heads": 0}, {"hidden_size": 0}):
        one_line(lambda size=size: bench_routed_attention((16,), (0.5,), **size), "hidden-size and heads")


@pytest.mark.parametrize("usage", [0.0, 0.1, 1.0])
def test_the_counted_cost_is_what_runs(usage: float) -> None:
    """Linear maps by counting, scores by the keys that each routed position must see."""
    mix, gate = layer(router_width=6), spread(50, usage)
    work = 0

    def note(module: torch.nn.Linear, given: tuple[Tensor], _out: Tensor) -> None:
        nonlocal work
        work += given[0].numel() * module.out_features

    for module in (mix.q_proj, mix.k_proj, mix.v_proj, mix.o_proj, mix.conv_value, mix.conv_output):
        module.register_forward_hook(note)
    with torch.no_grad():
        mix(torch.randn(1, 50, 16), gate=gate)
    seen = sum(at + 1 for at in gate[0].nonzero()[:, 0].tolist())
    others = 50 * 16 * 2 * 6 + 2 * 16 * seen + (50 * 16 * 5 if usage < 1 else 0)
    spared = int(gate.sum()) * 16 * 16 if usage < 0.5 else 0  # outputs of the convolution nobody needs, if they are few
    assert forward_cost(mix, gate) == work + others - (spared if usage else 0)


def test_mistakes_are_one_line() -> None:
    one_line(lambda: RoutedAttention(16, 3), "hidden-size")
    one_line(lambda: RecallModelConfig(mixing="mamba"), "mamba", "convolution")
    mask = torch.tensor([[1, 1, 0]])
    one_line(lambda: model()(ids(1, 3), attention_mask=mask, use_cache=True), "left")
