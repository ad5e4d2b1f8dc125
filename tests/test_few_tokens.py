"""Operators and kernels for a few tokens equal PyTorch's and eager's. Where there is no compiler these are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_generate import FREE, WIDTH, ragged, staggered
from test_speculative import crossed
from torch import Tensor

from layerwise.decoding.pass_times import BEFORE
from layerwise.model.cache import Cache
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.compiled import FEW_TOKENS, compiler_available
from layerwise.model.few_tokens import load_operators
from layerwise.model.tracing import FEW
from layerwise.plan import Plan

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C++ compiler")
FULL = Plan.full(tiny.LAYERS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


# -- operators -----------------------------------------------------------------------------------------------


def random_tensor(seed: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, expected: Tensor) -> None:
    """`found` equals the float64 `expected`, but for rounding in its own type."""
    rounding = 1e-5 if found.dtype == torch.float32 else 8e-3
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= rounding * expected.abs().max()


@DTYPES
@pytest.mark.parametrize(
    ("sizes", "k"),
    [
        ((64,), 64),
        ((7,), 96),  # no multiple of what is done at once
        ((1, 2, 3), 32),
        ((130, 9, 64), 160),  # maps of one input, as q, k and v
        ((9, 12), 48),  # these do not fit, and fall back
        ((5,), 7),
    ],
)
def test_linear(sizes: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    load_operators(print)
    weights = [random_tensor(n, n, k, dtype=dtype) for n in sizes]
    for tokens in range(1, 41):
        x = random_tensor(tokens, tokens, k, dtype=dtype)
        outputs = torch.ops.layerwise.few_token_linear(x, weights)
        for output, weight in zip(outputs, weights, strict=True):
            assert output.dtype == dtype
            near(output, torch.nn.functional.linear(x.double(), weight.double()))


def test_linear_of_any_layout() -> None:
    load_operators(print)
    weight, x, wide = random_tensor(0, 12, 64), random_tensor(1, 3, 5, 64), random_tensor(2, 12, 128)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    linear = torch.ops.layerwise.few_token_linear
    near(linear(x, [weight])[0], expected)
    near(linear(x.transpose(0, 1), [weight])[0], expected.transpose(0, 1))
    # Weights by columns, and a part of wider ones: beside one that fits.
    parts = linear(x, [weight.T.contiguous().T, weight, wide[:, :64]])
    near(parts[0], expected)
    near(parts[1], expected)
    near(parts[2], torch.nn.functional.linear(x.double(), wide[:, :64].double()))


@DTYPES
@pytest.mark.parametrize("size", [16, 32, 64, 128])  # the first does not fit, and falls back
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_attention(heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    load_operators(print)
    for rows, tokens, length, capacity in (
        (1, 1, 1, 64),
        (1, 4, 33, 64),
        (2, 9, 16, 16),
        (3, 17, 47, 128),
        (2, 3, 5, 8),
        (1, 8, 203, 256),  # several blocks of values
    ):
        query = random_tensor(0, rows, heads, tokens, size, dtype=dtype)
        keys, values = (random_tensor(seed, rows, groups, capacity, size, dtype=dtype) for seed in (1, 2))
        keys[:, :, length:], values[:, :, length:] = 1e4, 1e4  # what is beyond must not be seen
        hidden = torch.rand(rows, 1, tokens, length, generator=torch.Generator().manual_seed(3)) < 0.4
        hidden[..., 0] = False
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min)
        found = torch.ops.layerwise.few_token_attention(query, keys, values, mask, 0.17)
        k, v = (t[:, :, :length].double().repeat_interleave(heads // groups, 1) for t in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double(), k, v, mask.double().masked_fill(hidden, -torch.inf), scale=0.17
        ).transpose(1, 2)
        assert found.dtype == dtype
        near(found, expected)
        found = torch.ops.layerwise.few_token_attention(query, keys, values, None, 0.17, length)
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), k, v, scale=0.17)
        near(found, expected.transpose(1, 2))
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        torch.ops.layerwise.few_token_attention(query, keys, values, None, 0.17, capacity + 1)


def test_attention_of_scores_far_apart() -> None:
    load_operators(print)
    query, keys, values = (random_tensor(seed, 1, 2, 5, 64) for seed in range(3))
    mask = torch.zeros(1, 1, 5, 5)
    for scale in (1e-4, 1.0, 50.0):
        found = torch.ops.layerwise.few_token_attention(query, keys, values, mask, scale)
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.double(), keys.double(), values.double(), scale=scale
        )
        assert (found - exact.transpose(1, 2)).abs().max() < 1e-4


def test_operators_can_be_asked_for_again() -> None:
    """A process may have several engines, each with a line printer of its own."""
    for _ in range(2):
        load_operators(lambda line: None)


# -- kernels -------------------------------------------------------------------------------------------------


def attached(name: str, engine: str, dtype: torch.dtype = torch.float32) -> LayerwiseForCausalLM:
    return attach(tiny.model(name).to(dtype), engine=engine)


def build(model: LayerwiseForCausalLM, plan: Plan) -> None:
    """Make the kernels for a few tokens, and no other."""
    for visit in plan:
        assert model.runtime.engine._build(visit, FEW) is not None


def eager_calls(model: LayerwiseForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each layer call that runs eagerly."""
    engine, fallen = model.runtime.engine, []
    visit = engine.eager.visit

    def spy(step: Any, hidden: Tensor, frame: Any) -> Tensor:
        fallen.append(hidden.shape[:2].numel())
        return visit(step, hidden, frame)

    monkeypatch.setattr(engine.eager, "visit", spy)
    return fallen


@torch.no_grad()
def passes(model: LayerwiseForCausalLM, plan: Plan, prompt: list[int], parts: list[list[int]]) -> list[Tensor]:
    """Logits of passes after a prompt: parts[i][r] tokens of row r in pass i; some are taken back in between."""
    rows, generator = len(prompt), torch.Generator().manual_seed(0)
    kept, found = Cache(rows, 8), []  # grows on the way
    for number, counts in enumerate([prompt, *parts]):
        tokens = torch.randint(3, tiny.VOCABULARY, (rows, max(counts)), generator=generator)
        hidden = model.runtime.forward(model.embed(tokens), [plan] * rows, counts, kept)
        logits = model.runtime.engine.logits(hidden).float()
        found += [logits[row, :count] for row, count in enumerate(counts)]
        if number % 2:
            kept.rollback([n - min(1, count) for n, count in zip(kept.lengths, counts, strict=True)])
    return found


SHAPES: dict[str, tuple[list[int], list[list[int]]]] = {
    "one row": ([5], [[2], [3], [16], [7], [2], [9]]),
    "ragged": ([5, 1, 9], [[3, 1, 2], [1, 8, 5], [2, 2, 2], [1, 1, 1], [4, 1, 9]]),
    "batch decode": ([3, 12], [[1, 1]] * 10),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "text"),
    [("llama", "0-2 3*2 5 0"), ("mistral-window", "0-5"), ("gemma3", "0-1 3-5 4")],
)
def test_kernels_equal_eager(name: str, text: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (prompt, parts) = Plan.parse(text, tiny.LAYERS), SHAPES[shape]
    expected = passes(attached(name, "eager"), plan, prompt, parts)
    model = attached(name, "compiled")
    build(model, plan)
    fallen = eager_calls(model, monkeypatch)
    found = passes(model, plan, prompt, parts)
    assert len(fallen) == len(plan)  # the prompt, which makes the slots
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_more_than_a_few_tokens_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("llama", "compiled")
    build(model, FULL)
    fallen = eager_calls(model, monkeypatch)
    half = FEW_TOKENS // 2
    found = passes(model, FULL, [3, 4], [[half, half], [half + 1, half], [half, half - 1]])
    # The prompt, and the pass of which two rows of half + 1 columns are too many.
    assert fallen == [2 * 4] * tiny.LAYERS + [2 * (half + 1)] * tiny.LAYERS
    expected = passes(attached("llama", "eager"), FULL, [3, 4], [[half, half], [half + 1, half], [half, half - 1]])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_speculation_with_kernels_gives_the_greedy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 16, "eos_token_id": None}
    model, eager = attached("llama", "compiled"), attached("llama", "eager")
    fallen: list[int] | None = None
    for batch in ({"input_ids": torch.tensor([[5, 6, 7, 5, 6]])}, ragged(9, 4, 2)):
        expected = eager.generate(**batch, **options)
        model.ngrams = crossed([expected], batch["input_ids"].shape[1])
        for draft in ("ngram", "exit:3,4", "ngram+exit:2,2", "tree,6", "off"):
            assert torch.equal(model.generate(**batch, **options, draft=draft), expected), draft
            if fallen is None:
                fallen = eager_calls(model, monkeypatch)
    assert set(fallen) <= {5, 3 * 9, 3 * BEFORE}  # nothing but prompts, that of the passes which are timed too


def test_rows_that_ended_do_not_send_the_others_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, ends = staggered(tiny.model("llama"), 5, WIDTH, 2)
    options = {**FREE, "eos_token_id": ends, "pad_token_id": 0}
    expected = attached("llama", "eager").generate(**batch, **options)
    model = attached("llama", "compiled")
    model.prepare([FULL], few=True)
    fallen = eager_calls(model, monkeypatch)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert (expected[:, -1] == 0).any()  # some row had ended before the last
    assert set(fallen) == {3 * WIDTH}  # the prompt


def test_engines_with_lines_of_their_own_all_have_kernels() -> None:
    for lines in ([], []):
        model = attach(tiny.model("llama"), engine="compiled", notify=lines.append)
        model.runtime.engine.prepare([FULL], few=True)
        assert all(model.runtime.engine._layers[visit, FEW] is not None for visit in FULL)
        assert model.runtime.engine._heads[FEW] is not None


def test_a_mask_of_holes_runs_eagerly_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that changes leaves holes, which the kernels do not know."""
    results = []
    for engine in ("eager", "compiled"):
        model, kept = attached("llama", engine), Cache(1, 8)
        tokens = torch.randint(3, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for at, text in ((0, "0-5"), (4, "0 2-5"), (8, "0-5")):
                hidden = model.embed(tokens[:, at : at + 4])
                hidden = model.runtime.forward(hidden, [Plan.parse(text)], None, kept)
            results.append(model.runtime.engine.logits(hidden))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
