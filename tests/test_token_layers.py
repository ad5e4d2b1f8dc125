"""The operator for single tokens equals the layers that it stands for, and declines what it does not know."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_compiled import no_eager_calls, stepwise_logits
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from layerwise.model import compiled, token_layers
from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.compiled import compiler_available
from layerwise.model.few_tokens import load_operator
from layerwise.model.runtime import Runtime
from layerwise.model.thin import ThinMlps
from layerwise.model.token_layers import STREAMS, TokenHead, TokenLayer, faster_streams, run
from layerwise.model.tracing import ONE
from layerwise.plan import Part, Plan, Visit
from layerwise.trace import Trace

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")

# Wide enough for rows to be read in several places at once, by each of two threads; and sizes that fill no vector.
WIDE: dict[str, Any] = {
    "hidden_size": 238,
    "intermediate_size": 437,
    "num_attention_heads": 14,
    "num_key_value_heads": 7,
    "head_dim": 16,
    "vocab_size": 509,
}
KINDS = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": False}),
    "qwen2": (Qwen2Config, {"hidden_size": 224}),
    "mistral": (MistralConfig, {"sliding_window": None}),
}


def wide(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose layers are of a kind that the operator knows."""
    config, special = KINDS[kind]
    sizes = tiny.COMMON | WIDE | special
    if kind == "qwen2":
        del sizes["head_dim"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(**sizes)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
    return made


def with_thin_mlps(model: LayerwiseForCausalLM) -> None:
    """Thin MLPs in layers 1 and 4, mended, so that their map down has a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        thin = ThinMlps(model.runtime.backbone, {1: torch.arange(0, 400, 2), 4: torch.arange(37)}, rank=2)
        for mend in thin.mends.values():
            torch.nn.init.normal_(mend.out.weight, std=0.1)
            torch.nn.init.normal_(mend.out.bias)
    model.thin_by(thin.fold())


def kernels(model: LayerwiseForCausalLM) -> set[type]:
    """What runs single tokens of its layers."""
    return {type(one) for (_, form), one in model.runtime.engine._layers.items() if form == ONE}


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_by_the_operator_equal_eager(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.parse("0 1t 2*2 3a 4t 5m 0-1")
    results = []
    for engine in ("eager", "compiled"):
        model = attach(wide(kind), engine=engine)
        with_thin_mlps(model)
        fallen = no_eager_calls(model, monkeypatch) if engine == "compiled" else []
        model.runtime.engine.prepare([plan])
        fallen.clear()  # eager layers are what kernels are tried against
        results.append(stepwise_logits(model, plan))
    assert kernels(model) == {compiled.TokenKernel} and fallen == []
    assert torch.allclose(*results, atol=2e-4), (results[0] - results[1]).abs().max()


def greedy_calls(model: LayerwiseForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A list that gets what the engine answers when it is asked for a whole greedy token."""
    answers, ask = [], model.runtime.engine.greedy
    monkeypatch.setattr(model.runtime.engine, "greedy", lambda *given: answers.append(ask(*given)) or answers[-1])
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_in_one_call_are_the_same(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by layers, head and choice one after another, token for token; so are trace and cache."""
    model = attach(wide(kind).to(dtype), engine="compiled")
    with_thin_mlps(model)
    ids = torch.arange(3, 12)[None]
    for plan in ("0-5", "0 1t 2*2 3a 4t 0-1"):
        results, answers = [], greedy_calls(model, monkeypatch)
        for asked in (True, False):
            if not asked:
                monkeypatch.setattr(model.runtime.engine, "greedy", lambda *_: None)
            trace, cache = Trace(), Cache(1, 4)
            made = model.generate(
                ids, max_new_tokens=20, do_sample=False, plans=[plan], trace=trace, past_key_values=cache
            )
            ends = {slot: store.ends for slot, store in cache.slots.items()}
            results.append((made.tolist(), trace.calls, trace.rows, cache.lengths, ends))
        assert results[0] == results[1] and len(answers) == 19 and None not in answers
        monkeypatch.undo()


def test_greedy_tokens_in_one_call_are_for_plain_choices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attach(wide("llama"), engine="compiled"), torch.arange(3, 12)[None]
    answers = greedy_calls(model, monkeypatch)
    others: list[dict[str, Any]] = [
        {"do_sample": True},
        {"repetition_penalty": 1.5},
        {"output_logits": True, "return_dict_in_generate": True},
        {"input_ids": ids.repeat(2, 1)},
    ]
    for options in others:
        model.generate(**{"input_ids": ids, "max_new_tokens": 4, "do_sample": False} | options)
    assert answers == []
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert len(answers) == 3


@torch.no_grad()
def test_greedy_tokens_need_a_cache_without_holes() -> None:
    model, plan = attach(wide("llama"), engine="compiled"), Plan.full(6)
    model.prepare([plan])
    cache, other = Cache(1, 8), Plan.parse("0-3 5")
    embedded = model.embed(torch.arange(3, 9)[None])
    model.runtime.forward(embedded, [other], None, cache)
    assert model.runtime.greedy(5, plan, cache) is None and cache.lengths == [6]
    assert model.runtime.greedy(5, other, cache) is not None and cache.lengths == [7]
    with torch.enable_grad():
        assert model.runtime.greedy(5, other, cache) is None


@pytest.mark.parametrize("width", [2, 5, 7, 8, 9])
@torch.no_grad()
def test_a_few_tokens_of_a_row_equal_eager_ones(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain and a tree, after a prompt, and a token after them."""
    plan, found = Plan.parse("0 1t 2*2 3-5"), []
    ids = torch.randint(3, 97, (1, 7 + 2 * width), generator=torch.Generator().manual_seed(1))
    tree = [[-1, *(at // 2 for at in range(width - 1))]]
    calls, run_all = [], compiled.run_token_layers
    monkeypatch.setattr(compiled, "run_token_layers", lambda *given: calls.append(given[1].shape[1]) or run_all(*given))
    for engine in ("eager", "compiled"):
        model = attach(wide("llama"), engine=engine)
        with_thin_mlps(model)
        model.runtime.engine.prepare([plan], few=width > 8)  # up to eight it has the operator
        calls.clear()
        cache, forward = Cache(1, 8), model.runtime.forward
        forward(model.embed(ids[:, :6]), [plan], None, cache)
        chain = forward(model.embed(ids[:, 6 : 6 + width]), [plan], None, cache)
        branches = forward(model.embed(ids[:, 6 + width : -1]), [plan], None, cache, parents=tree)
        cache.retain([width], [[0, 1]])
        last = forward(model.embed(ids[:, -1:]), [plan], None, cache)
        found.append([model.runtime.engine.logits(one).float() for one in (chain, branches, last)])
    assert calls == ([width, width, 1] if width <= 8 else [1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@torch.no_grad()
def test_threads_that_share_out_the_keys_find_what_one_finds(threads: int) -> None:
    """Texts of which some threads see nothing, a part, or whole vectors of keys; one token, and a few with a mask."""
    ids = torch.randint(3, 97, (1, 128), generator=torch.Generator().manual_seed(1))
    for length in (1, 15, 33, 48, 120):
        found = []
        for engine in ("eager", "compiled"):
            model = attach(wide("llama"), engine=engine)
            model.prepare()
            cache, forward, plans = Cache(1, 8), model.runtime.forward, [Plan.full(6)]
            forward(model.embed(ids[:, :length]), plans, None, cache)
            one = forward(model.embed(ids[:, length : length + 1]), plans, None, cache)
            few = forward(model.embed(ids[:, length + 1 : length + 6]), plans, None, cache)
            found.append(torch.cat([one, few], 1))
        assert kernels(model) == {compiled.TokenKernel}
        torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_a_row_with_padding_runs_as_before() -> None:
    found = []
    for engine in ("eager", "compiled"):
        model = attach(wide("llama"), engine=engine)
        model.runtime.engine.prepare([Plan.full(6)], few=True)
        cache = Cache(1, 8)
        model(tiny.tokens(1, 5), past_key_values=cache)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        found.append(model(tiny.tokens(1, 6, 1), attention_mask=mask, past_key_values=cache).logits[:, :4])
        found[-1] = torch.cat([found[-1], model(tiny.tokens(1, 1, 2), past_key_values=cache).logits], 1)
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


def test_bfloat16_tokens_are_as_near_to_float32_as_eager_ones() -> None:
    plan = Plan.full(6)
    reference = stepwise_logits(attach(wide("llama"), engine="eager"), plan)
    eager, found = (
        stepwise_logits(attach(wide("llama").bfloat16(), engine=one), plan) for one in ("eager", "compiled")
    )
    assert (found - reference).abs().mean() <= 1.2 * (eager - reference).abs().mean()


@torch.no_grad()
def test_all_layers_of_a_pass_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(wide("llama"), engine="compiled")
    model.prepare()
    calls, run = [], compiled.run_token_layers
    monkeypatch.setattr(
        compiled, "run_token_layers", lambda layers, *rest: calls.append(len(layers)) or run(layers, *rest)
    )
    # Who asks for logits gets them after the layers, not a token from one call.
    options = {"output_logits": True, "return_dict_in_generate": True}
    model.generate(tiny.tokens(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, **options)
    assert calls == [6] * 3


def test_replaced_weights_are_noticed() -> None:
    prompt, options = tiny.tokens(1, 7), {"max_new_tokens": 12, "do_sample": False}
    base = wide("llama")
    model = attach(base, engine="compiled")
    model.generate(prompt, **options)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    assert torch.equal(model.generate(prompt, **options), base.generate(prompt, **options))
    base.bfloat16()
    assert attach(base).generate(prompt, **options).shape == model.generate(prompt, **options).shape


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "mistral-window", "llama"])
def test_layers_of_other_kinds_are_declined(name: str) -> None:
    """Norms per head or around branches, a window, heads that fill no vector."""
    assert TokenLayer.of(Backbone(tiny.model(name)), Visit(0)) is None


def test_layers_of_another_class_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have Llama's parts, and scale queries far into a text or leave positions out in every fourth layer."""
    backbone = Backbone(wide("llama"))
    monkeypatch.setattr(token_layers, "_KNOWN", ("MistralDecoderLayer",))
    assert TokenLayer.of(backbone, Visit(0)) is None


def test_a_norm_of_another_dtype_is_left_to_others() -> None:
    base = wide("llama").bfloat16()
    base.lm_head.float()
    base.model.norm.float()
    model = attach(base, engine="eager")
    expected = model.generate(tiny.tokens(1, 5), max_new_tokens=3, do_sample=False)
    model = attach(base, engine="compiled")
    assert torch.equal(model.generate(tiny.tokens(1, 5), max_new_tokens=3, do_sample=False), expected)


def test_bridges_biased_maps_and_adapters_are_declined() -> None:
    from peft import LoraConfig, get_peft_model

    backbone = Backbone(wide("llama"))
    assert TokenLayer.of(backbone, Visit(0)) is not None and TokenHead.of(backbone) is not None
    assert TokenLayer.of(backbone, Visit(0, Part.BRIDGE)) is None
    backbone.layers[1].mlp.up_proj = torch.nn.Linear(238, 437)
    backbone.layers[2].self_attn.q_proj.to(torch.bfloat16)
    assert [TokenLayer.of(backbone, Visit(at)) for at in (1, 2)] == [None, None]
    adapted = Backbone(get_peft_model(wide("llama"), LoraConfig(r=2, target_modules=["q_proj"])).get_base_model())
    assert TokenLayer.of(adapted, Visit(0)) is None and TokenLayer.of(adapted, Visit(0, Part.MLP)) is not None


def test_a_layer_that_only_looks_known_gets_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Granite's, whose branches are scaled before they are added."""
    plan, layer = Plan.full(6), type(wide("llama").model.layers[0])
    forward = layer.forward
    halved = functools.wraps(forward)(lambda *given, **named: 0.5 * forward(*given, **named))
    monkeypatch.setattr(layer, "forward", halved)
    model = attach(wide("llama"), engine="compiled")
    model.runtime.engine.prepare([plan])
    assert kernels(model) == {compiled.Kernel}
    assert torch.allclose(stepwise_logits(model, plan), stepwise_logits(attach(wide("llama")), plan), atol=2e-4)


def test_without_the_operator_everything_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no compiler today")

    monkeypatch.setattr(compiled, "load_operator", fails)
    monkeypatch.setattr(compiled, "_failed", set())
    plan = Plan.full(6)
    with caplog.at_level(logging.WARNING):
        model = attach(wide("llama"), engine="compiled")
        found = stepwise_logits(model, plan)
    assert caplog.text.count("no compiler today") == 1
    assert torch.allclose(found, stepwise_logits(attach(wide("llama")), plan), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_however_many_places_memory_is_read_the_sums_are_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_operator("token_layers", lambda line: None)
    backbone, found = Backbone(wide("llama").to(dtype)), []
    layers, hidden = [TokenLayer.of(backbone, Visit(at)) for at in range(6)], torch.ones(1, 1, 238).to(dtype)
    for streams in STREAMS:
        keys, values = ([torch.zeros(1, 7, 4, 16).to(dtype) for _ in layers] for _ in "kv")
        rotary = torch.ones(1, 1, 16).to(dtype), torch.zeros(1, 1, 16).to(dtype)
        found.append((run(layers, hidden, keys, values, 0, rotary, None, streams), keys[5], values[5]))
        head = TokenHead.of(backbone)
        assert head is not None
        found[-1] += (head.run(hidden, streams),)
    for one, other in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert one.abs().max() > 0 and torch.allclose(one.float(), other.float(), atol=tolerance)
    assert faster_streams(layers) is None
    monkeypatch.setattr(token_layers, "ENOUGH", 0)
    assert faster_streams(layers) in STREAMS


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_not_read(tmp_path: Path) -> None:
    """Kernels that trust their sizes would read beyond the end."""
    load_operator("token_layers", lambda line: None)
    model = attach(wide("llama"))
    backbone, cache = model.runtime.backbone, Cache(1, 8)
    Runtime(backbone).forward(model.embed(tiny.tokens(1, 3)), [Plan.full(6)], None, cache)
    layer, hidden = TokenLayer.of(backbone, Visit(0)), torch.zeros(1, 1, 238)
    store = cache.slots[Plan.full(6).slots[0]]
    rotary = torch.ones(1, 1, 16), torch.ones(1, 1, 16)
    call = torch.ops.layerwise.token_layers.default
    for place, weights in ((store.keys.shape[2], layer.weights), (3, layer.weights[:-1])):
        with pytest.raises(RuntimeError, match="do not fit"):
            call(hidden, weights, [store.keys], [store.values], place, *rotary, rotary[0][:0], 1e-6, 0.25, 6)
    with pytest.raises(RuntimeError):
        call(hidden.bfloat16(), layer.weights, [store.keys], [store.values], 3, *rotary, rotary[0][:0], 1e-6, 0.25, 6)
