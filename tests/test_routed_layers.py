"""Routed attention in a pretrained model: its own output where all attend, laws of cache and batch, real skipping."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tables import routed_text_table
from test_routed_attention import CLOSE, Counter
from tiny import one_line
from torch import Tensor

from layerwise import attach, from_pretrained
from layerwise.evaluation.routed_text import CURVE
from layerwise.model.cache import Cache
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.compiled import CompiledEngine
from layerwise.model.routed_attention import Mixing
from layerwise.model.routed_layers import RoutedSelfAttention
from layerwise.plan import Plan
from layerwise.report.attention_figures import routed_text_figure
from layerwise.training import routed_fit
from layerwise.training.curriculum import RoutedTextConfig
from layerwise.training.routed_fit import States, fit_layer, fit_taps, metric
from layerwise.training.routed_text import TextRun, convert, cut

KINDS = ["llama", "qwen2", "mistral"]


def routed(kind: str = "llama", layers: tuple[int, ...] = (0, 2, 5)) -> LayerwiseForCausalLM:
    """A tiny model whose routers, taps and corrections are random: about half of the positions attend."""
    model = attach(tiny.model(kind))
    torch.manual_seed(1)
    for layer in convert(model, layers, taps=5, router_width=8, rank=3):
        with torch.no_grad():
            layer.correction[-1].weight.normal_(std=0.3)
            layer.correction[-1].bias.normal_(std=0.3)
            layer.taps += 0.3 * torch.randn_like(layer.taps)
            layer.sink += 0.3 * torch.randn_like(layer.sink)
            layer.router[-1].weight += torch.randn_like(layer.router[-1].weight)
            layer.router[-1].bias.zero_()
    return model.eval()


def ids(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_everywhere_is_the_pretrained_model(kind: str) -> None:
    model, tokens = routed(kind), ids(2, 30)
    with torch.no_grad():
        expected = tiny.model(kind)(tokens).logits
        assert not torch.allclose(model(tokens).logits, expected, **CLOSE)
        with model.routed_layers.mixing("attention"):
            torch.testing.assert_close(model(tokens).logits, expected, **CLOSE)
        torch.testing.assert_close(model.base(tokens).logits, expected, **CLOSE)  # left as it was


@pytest.mark.parametrize("mixing", ["routed", "convolution"])
@torch.no_grad()
def test_the_convolution_reads_no_hole(mixing: Mixing) -> None:
    """What a rollback left behind in a slot, and a plan without the layer then jumped over, counts for nothing."""
    model, tokens = routed(), ids(2, 20)
    results = []
    with model.routed_layers.mixing(mixing):
        for forgotten in (10, 0):
            cache = Cache(2, 64)
            model(tokens[:, : 10 + forgotten], past_key_values=cache)
            cache.rollback(10)
            passes = (("0-1 3-5", tokens[:, 10:15]), ("0-5", tokens[:, 15:16]))
            results.append([model(part, past_key_values=cache, plans=[plan] * 2).logits for plan, part in passes])
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_routed_pass_equals_the_blend(kind: str) -> None:
    """With gradients both are computed everywhere and blended by the same hard gates."""
    model, tokens = routed(kind), ids(3, 40)
    mask = torch.arange(40)[None] < torch.tensor([[40], [23], [7]])
    blended = model(tokens, attention_mask=mask.long()).logits
    usage = model.routed_layers.routing().gate.mean()
    assert 0.1 < usage < 0.9
    with torch.no_grad():
        gathered = model(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(gathered[mask], blended[mask], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_in_a_batch_of_different_lengths(kind: str) -> None:
    model, lengths = routed(kind), (20, 9)
    rows = [ids(1, length + 8, seed) for seed, length in enumerate(lengths)]
    prompt, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompt[row, :length], mask[row, :length] = rows[row][0, :length], 1
    with torch.no_grad():
        output = model(prompt, attention_mask=mask, use_cache=True)
        cache, found = output.past_key_values, [[], []]
        for at, width in ((0, 1), (1, 1), (2, 3), (5, 3)):
            new = torch.cat([rows[row][:, length + at : length + at + width] for row, length in enumerate(lengths)])
            logits = model(new, past_key_values=cache).logits
            for row in range(2):
                found[row].append(logits[row])
        for row, length in enumerate(lengths):
            torch.testing.assert_close(torch.cat(found[row]), model(rows[row]).logits[0, length:], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_for_a_token_equals_the_modules(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every mixing, and after a rollback, also to the start."""
    tokens, prepared, ran = ids(1, 40), routed(kind), []
    monkeypatch.setattr(CompiledEngine, "_kernel", lambda *_: None)  # all else runs eagerly
    prepared.runtime.engine = CompiledEngine(prepared.runtime.backbone)
    models = [model.to(dtype) for model in (routed(kind), prepared)]
    for model in models:
        model.routed_layers.float()
    usual = RoutedSelfAttention.token
    monkeypatch.setattr(RoutedSelfAttention, "token", lambda *given: ran.append(usual(*given)) or ran[-1])
    for number, layer in zip(prepared.routed_layers.numbers, prepared.routed_layers, strict=True):
        layer.prepare(prepared.runtime.backbone.layers[number].input_layernorm, print)
    assert [*prepared.routed_layers.state_dict()] == [*models[0].routed_layers.state_dict()]
    close = CLOSE if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}

    def logits(model: LayerwiseForCausalLM) -> tuple[Tensor, Tensor]:
        cache, found, gates = Cache(1, 64), [], []
        for at in (*range(30), 17, 0):
            cache.rollback(at)
            mixings = {20: "attention", 21: "convolution", 22: "routed"}
            for layer in model.routed_layers:
                layer.mixing = mixings.get(at, layer.mixing)
            hidden = model.runtime.forward(model.embed(tokens[:, at : at + 1]), [Plan.full(6)], None, cache)
            found.append(model.runtime.engine.logits(hidden)[0, -1])
            gates.append(model.routed_layers.routing().gate.flatten())
        return torch.stack(found), torch.stack(gates)

    with torch.no_grad():
        (expected, gates), (found, said) = map(logits, models)
    assert len(ran) == 31 * 3 and all(one is not None for one in ran)  # the first pass makes the cache
    assert 0.1 < gates.mean() < 0.9
    agree = (gates == said).all(1)
    assert agree.all() if dtype == torch.float32 else agree.float().mean() > 0.9
    torch.testing.assert_close(found[agree], expected[agree], **close)


def test_causality() -> None:
    model, tokens = routed(), ids(1, 30)
    changed = tokens.clone()
    changed[0, 16:] = ids(1, 14, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(changed).logits[:, :16], model(tokens).logits[:, :16], **CLOSE)


def test_positions_that_do_not_attend_make_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = routed(layers=tuple(range(tiny.LAYERS))), ids(1, 40)
    count = Counter(monkeypatch)
    with torch.no_grad():
        model(tokens)
    assert count.queries == int(model.routed_layers.routing().gate.sum()) < 40 * tiny.LAYERS


def test_the_taps_begin_as_mean_attention() -> None:
    """Where each head attends by distance alone, the convolution is attention: here, all weights equal."""
    model = attach(tiny.model("llama"))
    for layer in model.runtime.backbone.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    layers = convert(model, (1,), taps=2, router_width=4)
    with torch.no_grad(), layers.measure():
        model(ids(2, 3))
    converted = next(iter(layers))
    for taps, sink in zip(converted.taps.detach(), converted.sink.detach(), strict=True):
        torch.testing.assert_close(taps, torch.tensor([(1 + 1 / 2 + 1 / 3) / 3, (1 / 2 + 1 / 3) / 2]))
        torch.testing.assert_close(sink, torch.tensor(1 / 3))


def test_the_first_position_is_exact_without_attention() -> None:
    model, tokens = routed(layers=tuple(range(tiny.LAYERS))), ids(2, 9)
    with torch.no_grad():
        with model.routed_layers.mixing("attention"):
            expected = model(tokens).logits
        with model.routed_layers.mixing("convolution"):
            found = model(tokens).logits
    torch.testing.assert_close(found[:, 0], expected[:, 0], **CLOSE)
    assert not torch.allclose(found[:, 1], expected[:, 1], **CLOSE)


def test_generate_save_and_load(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "base")
    model = from_pretrained(tmp_path / "base", engine="eager")
    prompt, options = ids(2, 12), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, **options)
    torch.manual_seed(2)
    for layer in convert(model, (1, 4), 4, 8, rank=2):
        torch.nn.init.normal_(layer.correction[-1].weight)
        torch.nn.init.normal_(layer.taps)
        torch.nn.init.normal_(layer.router[-1].weight)
    model.eval()
    expected = model.generate(prompt, **options)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(model.generate(prompt, use_cache=False, **options), expected)
    assert torch.equal(model.generate(prompt, draft="exit:3", **options), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = from_pretrained(tmp_path / "adapter", engine="eager")
    assert again.routed_layers.numbers == (1, 4)
    assert torch.equal(again.generate(prompt, **options), expected)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    one_line(lambda: convert(attach(tiny.model("gemma3")), (), 4, 8), "Gemma3Attention", "LlamaAttention")
    one_line(lambda: convert(attach(tiny.model("llama")), (7,), 4, 8), "0-5")
    one_line(lambda: cut([[1, 2, 3]], 4), "text-length")
    one_line(lambda: RoutedTextConfig(out=str(tmp_path), taps=0), "taps")


# -- least squares -----------------------------------------------------------------------------------------------


def states_of(layer: RoutedSelfAttention, texts: int = 16, length: int = 40) -> States:
    """As if attention gave what `layer` would, its correction left out, and errors in all directions cost alike."""
    inputs = layer.attention.q_proj.in_features
    states = States()
    for _ in range(texts):
        states.inputs.append(torch.randn(length, inputs))
        states.values.append(torch.randn(layer.kv_heads, length, layer.head_dim))
        states.attended.append(layer._filtered(states.values[-1][None], 0, length)[0].detach())
        states.gradients.append(torch.randn(length, inputs))
    return states


def planted() -> RoutedSelfAttention:
    torch.manual_seed(3)
    (layer,) = convert(attach(tiny.model("llama")), (1,), taps=3, router_width=8, rank=4)
    with torch.no_grad():
        layer.taps.normal_()
        layer.sink.normal_()
    return layer


def test_taps_and_sink_that_are_there_are_found() -> None:
    layer = planted()
    taps, sink, states = layer.taps.clone(), layer.sink.clone(), states_of(layer)
    with torch.no_grad():
        layer.taps.zero_()
        value = metric(states, layer.attention.o_proj.weight.float())
        fit_taps(layer, states, value, torch.ones(16, 40))
        torch.testing.assert_close(layer.taps, taps, rtol=0.02, atol=0.02)
        torch.testing.assert_close(layer.sink, sink, rtol=0.02, atol=0.02)


def test_the_fit_finds_what_inputs_tell_and_routes_where_it_is_wrong() -> None:
    """What attention adds is a map of rank 2 of the input, and noise where the input's third number is positive."""
    layer = planted()
    states = states_of(layer)
    width = states.attended[0].shape[1]
    map_ = torch.randn(2, width)
    for inputs, attended in zip(states.inputs, states.attended, strict=True):
        attended += inputs[:, :2] @ map_ + 3 * torch.randn(40, width) * (inputs[:, 2:3] > 0)
    cost, logits = fit_layer(layer, states, torch.Generator().manual_seed(0))
    noisy = torch.stack(states.inputs)[:, 1:, 2] > 0
    assert cost > 0.1
    assert logits[:, 1:][noisy].median() > logits[:, 1:][~noisy].quantile(0.9)
    with torch.no_grad():
        inputs = torch.randn(200, states.inputs[0].shape[1])
        features = torch.cat((inputs, torch.zeros(200, width)), 1)
        wrong = (layer.correction(features) - inputs[:, :2] @ map_).square().mean()
    assert wrong < 0.2 * (inputs[:, :2] @ map_).square().mean()


# -- training ----------------------------------------------------------------------------------------------------


def run(out: Path, **changes: Any) -> TextRun:
    given = {"steps": 6, "eval_every": 2, "save_every": 2, "eval_rows": 4, "test_rows": 4, "taps": 4, "text_length": 16}
    given |= {"router_width": 8, "rows": 2, "convert": "1-4", "solved": 0.01, "floor": 0.01, "learning_rate": 0.05}
    given |= {"method": "curriculum", "rank": 0}
    config = RoutedTextConfig(out=str(out), **{**given, **changes})
    texts = {split: ids(8, 16, seed) for seed, split in enumerate(("train", "validation", "test"))}
    return TextRun(config, attach(tiny.model("llama")), texts, lambda line: None)


def test_the_penalty_lowers_usage_and_touches_the_base_nowhere(tmp_path: Path) -> None:
    training = run(tmp_path, steps=40, usage_target=0.2)
    before = {name: value.clone() for name, value in training.model.base.state_dict().items()}
    training.run(resume=False)
    result = training.finish()
    first = training.history[0]["usage"]
    assert result["usage"] < 0.6 * first and result["perplexity"] > 1
    assert result["base_perplexity"] != result["convolution_perplexity"]
    assert all(torch.equal(before[name], value) for name, value in training.model.base.state_dict().items())


def test_a_fit_holds_the_usage_aimed_at_and_reports_controls(tmp_path: Path) -> None:
    training = run(tmp_path, method="fit", rank=2, usage_target=0.3, learning_rate=0.001, fit_texts=8)
    training.texts["test"] = training.texts["validation"]
    training.run(resume=False)
    result = training.finish()
    assert result["usage"] == pytest.approx(0.25, abs=0.08)  # somewhat below
    assert training.history[0]["phase"] == "fit" and len(training.history) == 4
    assert result["controls"]["random"]["usage"] == pytest.approx(result["usage"], abs=0.1)
    assert 0 <= result["controls"]["static"]["usage"] - result["usage"] < 0.25  # whole layers of four, rounded up
    assert [point["usage"] for point in result["curve"]] == sorted(point["usage"] for point in result["curve"])
    low, high = result["interval"]
    assert low <= result["ratio"] <= high and result["generate"][0]["routed_step_seconds"] > 0
    assert all(layer.mixing == "routed" for layer in training.routed)  # controls have left nothing behind
    table = routed_text_table(result)
    assert f"{result['perplexity']:.2f}" in table and table.count("| routed, another") == len(CURVE)
    routed_text_figure(result, tmp_path / "routed_text.png")
    assert (tmp_path / "routed_text.png").stat().st_size > 5000


@pytest.mark.parametrize("changes", [{}, {"method": "fit", "rank": 2, "learning_rate": 0.001}])
def test_resumed_equals_uninterrupted(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **changes)
    whole.run(resume=False)
    broken = run(tmp_path / "broken", **changes)
    broken.begin(resume=False)
    for _ in range(2):
        broken.step()
    broken = run(tmp_path / "broken", **changes)
    broken.run(resume=True)
    ours, theirs = broken.routed.state_dict(), whole.routed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_in_the_fit_keeps_what_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, usual = {"method": "fit", "rank": 2}, routed_fit.fit
    monkeypatch.setattr(routed_fit, "fit", lambda *given: signal.raise_signal(signal.SIGINT) or usual(*given))
    broken = run(tmp_path, **fit)
    with pytest.raises(KeyboardInterrupt):
        broken.run(resume=False)
    monkeypatch.setattr(routed_fit, "fit", lambda *_: pytest.fail("fitted again"))
    resumed = run(tmp_path, **fit)
    resumed.begin(resume=True)
    assert resumed.number == 0 and [entry["phase"] for entry in resumed.history] == ["fit"]
    ours, theirs = resumed.routed.state_dict(), broken.routed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
