"""The law of packing: each row's tokens move to the left, in order, and back to where they came from."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import ARCHITECTURES, LAYERS, VOCABULARY, WINDOW, model
from torch import Tensor

from layerwise.model.backbone import Backbone
from layerwise.model.packing import Packing, last_of
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan

LAYOUTS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "both sides": [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]],
    "interior": [[1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 0, 1]],
    "one row of each": [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 1, 0]],
    "all the same length": [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 1, 0]],
    "none": [[1, 1, 1, 1, 1]] * 3,
    "a single column": [[1], [1], [1]],
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def mask_of(layout: str) -> Tensor:
    return torch.tensor(LAYOUTS[layout])


def random_mask(rng: random.Random, rows: int, width: int) -> Tensor:
    """Zeros and ones anywhere, at least one token a row."""
    kept = [set(rng.sample(range(width), rng.randint(1, width))) for _ in range(rows)]
    return torch.tensor([[int(column in row) for column in range(width)] for row in kept])


def packing_law(mask: Tensor) -> None:
    """What packing is: said row by row with boolean indices, for ids and for states."""
    rows, width = mask.shape
    packing = Packing.of(rows, width, mask)
    assert packing.counts == mask.sum(1).tolist()
    ids = torch.arange(rows * width).reshape(rows, width)
    states = torch.stack([ids, -ids, ids + 1000], dim=2).float()
    packed = packing.pack(states)
    assert packed.shape == states.shape
    restored = packing.unpack(packed)
    assert restored.shape == states.shape
    last = last_of(packed, packing.counts)
    assert last.shape == (rows, 1, 3)
    for row, count in enumerate(packing.counts):
        tokens = mask[row].bool()
        assert torch.equal(packing.pack(ids)[row, :count], ids[row, tokens])
        assert torch.equal(packed[row, :count], states[row, tokens])
        assert torch.equal(restored[row, tokens], states[row, tokens])
        assert torch.equal(last[row, 0], states[row, tokens][-1])


@EVERY_LAYOUT
def test_tokens_go_to_the_left_in_order_and_back_to_their_columns(layout: str) -> None:
    packing_law(mask_of(layout))


def test_any_mask_packs_and_unpacks() -> None:
    rng = random.Random(0)
    for _ in range(200):
        packing_law(random_mask(rng, rng.randint(1, 5), rng.randint(1, 9)))


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int8])
def test_a_mask_of_any_type_packs_alike(layout: str, dtype: torch.dtype) -> None:
    packing_law(mask_of(layout).to(dtype))


@pytest.mark.parametrize("layout", ["right", "none", "a single column"])
def test_what_stands_to_the_left_is_not_moved(layout: str) -> None:
    mask = mask_of(layout)
    packing = Packing.of(*mask.shape, mask)
    states = torch.randn(*mask.shape, 2)
    assert packing.order is None
    assert packing.pack(states) is states
    assert packing.unpack(states) is states


def test_without_a_mask_every_column_is_a_token() -> None:
    packing = Packing.of(2, 3, None)
    states = torch.randn(2, 3, 4)
    assert packing.counts == [3, 3]
    assert packing.pack(states) is states
    assert torch.equal(last_of(states, packing.counts), states[:, 2:])


@EVERY_LAYOUT
def test_of_a_mask_over_cached_tokens_too_the_last_columns_count(layout: str) -> None:
    mask = mask_of(layout)
    rows, width = mask.shape
    columns = torch.arange(mask.numel()).reshape(mask.shape)
    expected = Packing.of(rows, width, mask)
    for cached in (torch.ones(rows, 4), torch.zeros(rows, 4), random_mask(random.Random(1), rows, 4)):
        found = Packing.of(rows, width, torch.cat([cached.to(mask), mask], dim=1))
        assert found.counts == expected.counts
        assert torch.equal(found.pack(columns), expected.pack(columns))


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 4, 4), (2, 4, 4), (8,), (3, 4), (1, 4), (2, 3), (4, 2)],
    ids=str,
)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(rows, columns\) = \(2, 4\)"):
        Packing.of(2, 4, torch.ones(shape))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_without_a_token_is_refused_by_number(row: int) -> None:
    mask = torch.ones(3, 4)
    mask[row] = 0
    with pytest.raises(ValueError, match=f"row {row} of the batch has no token"):
        Packing.of(3, 4, mask)
    with pytest.raises(ValueError, match=f"row {row} of the batch has no token"):
        Packing.of(3, 4, torch.cat([torch.ones(3, 2), mask], dim=1))  # its cached tokens do not help


def test_gradients_return_to_the_columns_they_came_from() -> None:
    mask = mask_of("one row of each")
    packing = Packing.of(*mask.shape, mask)
    states = torch.randn(*mask.shape, 2, requires_grad=True)
    weights = torch.randn(*mask.shape, 2)
    (packing.unpack(packing.pack(states)) * weights)[mask.bool()].sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, weights * mask[:, :, None])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_padded_batch_through_packing_equals_the_models_own_forward(name: str, side: str) -> None:
    width, counts = 2 * WINDOW, [2 * WINDOW, 3, WINDOW + 1]
    rows = [[0] * (width - count) + [1] * count for count in counts]
    mask = torch.tensor(rows if side == "left" else [row[::-1] for row in rows])
    ids = torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(Backbone(model(name)))
    packing = Packing.of(*mask.shape, mask)
    packed = packing.pack(runtime.backbone.embedding(ids))
    hidden = runtime.forward(packed, [Plan.full(LAYERS)] * len(counts), packing.counts)
    found = runtime.backbone.logits(packing.unpack(hidden))[mask.bool()]
    expected = runtime.backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
