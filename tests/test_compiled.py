"""The compiled engine equals eager. Kernels are really compiled here; where there is no compiler these are skipped."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from layerwise import paths
from layerwise.model import compiled, kernels
from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.compiled import CompiledEngine, compiler_available
from layerwise.model.exit_head import ExitHead
from layerwise.model.runtime import EagerEngine
from layerwise.model.tracing import ONE, HeadSource, LayerSource
from layerwise.paths import cache_dir
from layerwise.plan import Plan, Step
from layerwise.policies.router import MenuPolicy, Routers
from layerwise.training.routed_text import convert

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")


def attached(name: str, engine: str = "compiled", dtype: torch.dtype = torch.float32) -> LayerwiseForCausalLM:
    return attach(tiny.model(name).to(dtype), engine=engine)


@torch.no_grad()
def stepwise_logits(model: LayerwiseForCausalLM, plan: Plan, prompt: int = 5, steps: int = 12) -> torch.Tensor:
    """Logits of decoding fixed tokens one by one after a prompt."""
    tokens = torch.randint(3, 97, (1, prompt + steps), generator=torch.Generator().manual_seed(1))
    cache = Cache(1, 8)  # grows on the way
    model.runtime.forward(model.embed(tokens[:, :prompt]), [plan], None, cache)
    rows = []
    for at in range(prompt, prompt + steps):
        hidden = model.runtime.forward(model.embed(tokens[:, at : at + 1]), [plan], None, cache)
        rows.append(model.runtime.engine.logits(hidden)[0, -1].float())
    return torch.stack(rows)


def no_eager_calls(model: LayerwiseForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record single-token calls that fall back to eager."""
    engine, fallen = model.runtime.engine, []
    visit = engine.eager.visit

    def spy(step, hidden, frame):
        if hidden.shape[1] == 1:
            fallen.append(str(step.visit))
        return visit(step, hidden, frame)

    monkeypatch.setattr(engine.eager, "visit", spy)
    return fallen


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", "0-2 3*2 4a 5m 0"),
        ("qwen2", "0 2-5"),  # biases
        ("mistral-window", "0-5"),
        ("gemma3", "0-1 3-5 4"),  # two kinds of layers, norms per head and around branches
    ],
)
def test_kernels_equal_eager(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.parse(text, 6)
    expected = stepwise_logits(attached(name, "eager"), plan)
    model = attached(name)
    model.runtime.engine.prepare([plan])
    fallen = no_eager_calls(model, monkeypatch)
    found = stepwise_logits(model, plan)
    assert fallen == []
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()


@pytest.mark.parametrize("plain", [True, False])
def test_of_converted_layers_attention_alone_has_no_kernel(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs by an operator for one token, or eagerly if something is asked for that the operator cannot do."""
    plan, results = Plan.full(6), []
    for name in ("eager", "compiled"):
        model = attached("llama", name)
        torch.manual_seed(2)
        for layer in convert(model, (1, 3), taps=5, router_width=8):
            layer.decide = layer.decide if plain else lambda logits: logits > 0.1
            with torch.no_grad():
                layer.taps += torch.rand_like(layer.taps)
        model.eval()
        model.runtime.engine.prepare([plan])
        fallen = no_eager_calls(model, monkeypatch) if name == "compiled" else []
        results.append(stepwise_logits(model, plan))
    assert fallen == ([] if plain else ["1a", "3a"] * 12)
    assert torch.allclose(*results, atol=1e-4)


def test_bfloat16_kernels_are_near_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.full(6)
    reference = stepwise_logits(attached("llama", "eager"), plan)
    eager = stepwise_logits(attached("llama", "eager", torch.bfloat16), plan)
    model = attached("llama", dtype=torch.bfloat16)
    model.runtime.engine.prepare([plan])
    fallen = no_eager_calls(model, monkeypatch)
    found = stepwise_logits(model, plan)
    assert fallen == []
    # Kernels keep sums in float32, so they are as near to float32 as eager bfloat16 is, or nearer.
    assert (found - reference).abs().mean() <= 1.2 * (eager - reference).abs().mean()


def test_one_compilation_serves_all_layers_and_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(cache_dir("apart")))
    notes: list[str] = []
    model = attach(tiny.model("llama"), engine="compiled", notify=notes.append)
    model.runtime.engine.prepare([Plan.full(6)])
    assert sum(note.startswith("compiling a kernel") for note in notes) == 1  # one layer that serves all six
    assert model.runtime.engine.compile_seconds > 0
    known = len(notes)
    monkeypatch.setattr(kernels, "_packages", {})
    again = attach(tiny.model("llama", seed=1), engine="compiled", notify=notes.append)
    again.runtime.engine.prepare([Plan.full(6)])
    assert len(notes) == known and again.runtime.engine.compile_seconds == 0


def test_random_plans_with_holes_and_rollback_equal_eager() -> None:
    """Plans that change midway leave holes; the engine must notice and give the same logits as eager."""
    rng = random.Random(3)
    models = [attached("llama", engine) for engine in ("eager", "compiled")]
    tokens = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    plans = [Plan.parse(rng.choice(["0-5", "0-2 4-5", "0 1 1 3-5"])) for _ in range(30)]
    results = []
    for model in models:
        cache, rows = Cache(1, 64), []
        with torch.no_grad():
            model.runtime.forward(model.embed(tokens[:, :6]), [plans[0]], None, cache)
            for at in range(6, 30):
                hidden = model.runtime.forward(model.embed(tokens[:, at : at + 1]), [plans[at]], None, cache)
                rows.append(model.runtime.engine.logits(hidden)[0, -1])
                if at % 7 == 0:
                    cache.rollback(cache.lengths[0] - 2)
        results.append(torch.stack(rows))
    assert torch.allclose(results[0], results[1], atol=1e-4)


def test_generate_is_the_same_token_for_token() -> None:
    prompt = torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(4))
    base = tiny.model("llama")
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = base.generate(prompt, **options)
    assert torch.equal(attach(base, engine="compiled").generate(prompt, **options), expected)


def test_replaced_parameters_are_noticed() -> None:
    """Weights trained or merged in place, cast, or wrapped by PEFT after the kernels were made."""
    from peft import LoraConfig, get_peft_model

    prompt = torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    base = tiny.model("llama")
    model = attach(base, engine="compiled")
    model.generate(prompt, **options)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    assert torch.equal(model.generate(prompt, **options), base.generate(prompt, **options))
    base.double()
    assert torch.equal(model.generate(prompt, **options), base.generate(prompt, **options))
    base.float()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = adapted.generate(input_ids=prompt, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    with adapted.disable_adapter():
        plain = adapted.generate(input_ids=prompt, **options)
        assert torch.equal(model.generate(prompt, **options), plain) and not torch.equal(plain, expected)
    adapted.merge_adapter()
    assert torch.equal(model.generate(prompt, **options), expected)


def test_an_answer_looks_at_no_kernel_that_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = attach(tiny.model("llama"), engine="compiled"), tiny.tokens(1, 8)
    routers = Routers.random(1, 2 * tiny.COMMON["hidden_size"], 2, units=8)
    routers.outer_bias[0, 1] = 100.0
    model.policy = MenuPolicy((Plan.full(6), Plan.parse("0 5")), routers)
    model.prepare()
    looked, identity = [], compiled.identity
    monkeypatch.setattr(compiled, "identity", lambda *modules: looked.append(modules) or identity(*modules))
    backbone = model.runtime.backbone
    for _ in range(2):
        model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert looked == [(backbone.norm, backbone.head), (backbone.layers[0],), (backbone.layers[5],)]
        looked.clear()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that compute nothing, and notice that parameters were replaced, which a real one does not.

    Returns what was run.
    """
    ran: list[str] = []
    make = compiled.Kernel.__init__

    def checking(self: compiled.Kernel, path: Path, source: LayerSource | HeadSource) -> None:
        make(self, path, source)
        made_for = [(id(weight), weight.dtype) for weight in source.weights]

        def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
            ran.append(source.title)
            head = isinstance(source, HeadSource)
            now = HeadSource(source.backbone) if head else LayerSource(source.backbone, source.visit)
            assert made_for == [(id(weight), weight.dtype) for weight in now.weights], source.title
            assert given[0].dtype == made_for[0][1], source.title
            return [given[0].new_zeros(*given[0].shape[:2], len(source.backbone.head.weight)) if head else given[0]]

        self.run = run

    monkeypatch.setattr(compiled, "load_operators", lambda notify: None)
    monkeypatch.setattr(compiled, "package", lambda source, path: None)
    monkeypatch.setattr(kernels, "_loaded", lambda path: None)
    monkeypatch.setattr(compiled.Kernel, "__init__", checking)
    monkeypatch.setattr(CompiledEngine, "_agrees", lambda *_: True)
    return ran


def chat(model: LayerwiseForCausalLM) -> None:
    """Two turns of one row: each prompt's end and each answer are read by kernels for one token and for a few."""
    cache, text = Cache(1, 64), torch.arange(3, 8)[None]
    for _ in range(2):
        text = model.generate(text, past_key_values=cache, max_new_tokens=3, do_sample=False)
        text = torch.cat([text, torch.arange(9, 13)[None]], 1)


def cast(model: LayerwiseForCausalLM) -> None:
    model.to(torch.bfloat16)


def adapt(model: LayerwiseForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model.base, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("change", [cast, adapt])
def test_no_kernel_outlives_its_parameters(change: Callable[[LayerwiseForCausalLM], None], checked: list[str]) -> None:
    model = attached("llama")
    batch = torch.arange(3, 13).view(2, 5)
    model.generate(batch, max_new_tokens=3, do_sample=False)  # makes kernels for a few tokens
    chat(model)
    change(model)
    checked.clear()
    chat(model)
    assert {title.split(", ")[1] for title in checked} == {"one token", "a few tokens"}


@pytest.mark.parametrize("change", [cast, adapt])
def test_forward_runs_no_kernel_of_replaced_parameters(
    change: Callable[[LayerwiseForCausalLM], None], checked: list[str]
) -> None:
    model = attached("llama")
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False)
    change(model)
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
        model(torch.tensor([[6]]), past_key_values=cache)
    assert checked


def test_a_cast_amid_a_text_runs_eagerly(checked: list[str]) -> None:
    model, plans = attached("llama"), [Plan.full(6)]
    model.runtime.engine.prepare(plans)
    model.to(torch.bfloat16)
    with torch.no_grad():
        cache = Cache(1, 8)
        for text in ([3, 4, 5], [6]):
            hidden = model.runtime.forward(model.embed(torch.tensor([text])), plans, None, cache)
        model.runtime.engine.logits(hidden)
    assert checked == []


def test_the_cut_head_is_made_anew_too(checked: list[str]) -> None:
    model = attached("llama")
    model.exit_head = ExitHead(model.runtime.backbone, 2, list(range(3, 50)))
    for _ in range(2):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False, draft="plan:0-3")
        assert "the LM head, a few tokens" in checked
        cast(model)


def test_gradients_and_batches_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("llama")
    monkeypatch.setattr(CompiledEngine, "_build", lambda *_: pytest.fail("compiled for a call that it cannot serve"))
    model(torch.tensor([[5]])).logits.sum().backward()
    with torch.no_grad():
        model(torch.tensor([[5], [6]]), use_cache=True)


def test_kernels_are_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("llama")
    engine = model.runtime.engine
    engine._heads[ONE] = engine._layers[Plan.full(6).visits[0], ONE] = object()  # made before the model moved
    model.to("meta")
    monkeypatch.setattr(CompiledEngine, "_load", lambda *_: pytest.fail("compiled for another device"))
    engine.prepare([Plan.full(6)], few=True)
    hidden = torch.empty(1, 1, 32, device="meta")
    frame = SimpleNamespace(cache=Cache(1, 8), device=hidden.device)
    with torch.no_grad():
        assert engine.logits(hidden).device.type == "meta"
        assert engine._kernel(Step(Plan.full(6).visits[0], None), hidden, frame) is None
    monkeypatch.setattr("layerwise.model.causal_lm.check_fit", lambda *_: None)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda"))
    assert isinstance(attached("llama", "auto").runtime.engine, EagerEngine)
    with pytest.raises(ValueError, match="for the CPU, and the model is on cuda"):
        attached("llama", "compiled")


def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = attached("llama")
    load = CompiledEngine._load

    class Wrong:
        def __init__(self, kernel):
            self.kernel, self.weights, self.form, self.dtype = kernel, [], kernel.form, kernel.dtype

        def run(self, arguments):
            return [self.kernel.run([*arguments, *self.kernel.weights])[0] + 10]

    monkeypatch.setattr(CompiledEngine, "_load", lambda self, source: Wrong(load(self, source)))
    visit = Plan.full(6).visits[0]
    with caplog.at_level(logging.WARNING, "layerwise"):
        model.runtime.engine._build(visit, ONE)
    assert model.runtime.engine._layers[visit, ONE] is None
    assert "differs from eager" in caplog.text


def test_what_cannot_be_compiled_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction\nand a page of output")

    monkeypatch.setenv("LAYERWISE_CACHE", str(cache_dir("broken")))
    monkeypatch.setattr(compiled, "package", broken)
    monkeypatch.setattr(compiled, "_failed", set())
    plan = Plan.full(6)
    with caplog.at_level(logging.WARNING, "layerwise"):
        found = stepwise_logits(attached("llama"), plan)
    assert torch.allclose(found, stepwise_logits(attached("llama", "eager"), plan))
    assert "no such instruction" in caplog.text and "page of output" not in caplog.text
    assert len(caplog.records) == 1  # of six layers alike


def test_code_made_for_another_cpu_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(cache_dir("shared")))
    made: list[str] = []
    monkeypatch.setattr(compiled, "package", lambda source, path: made.append(str(path)) or path.touch())
    monkeypatch.setattr(compiled, "Kernel", lambda *_: None)
    for features in ("flags: avx2", "flags: avx2 avx512f", "flags: avx2"):
        monkeypatch.setattr(paths, "cpu_features", lambda features=features: features)
        attached("llama").runtime.engine.prepare([Plan.full(6)])
    assert len(made) == len(set(made)) == 2


def test_engine_choice() -> None:
    assert isinstance(attached("llama", "eager").runtime.engine, EagerEngine)
    assert isinstance(attached("llama", "auto").runtime.engine, CompiledEngine)
    with pytest.raises(ValueError, match="no engine 'fast'"):
        attached("llama", "fast")


def test_compiled_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.model.causal_lm.compiler_available", lambda: False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        attached("llama", "compiled")
    assert isinstance(attached("llama", "auto").runtime.engine, EagerEngine)
