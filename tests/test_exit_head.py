"""The exit head drafts as it was trained, is saved and loaded whole, and leaves its base alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_hub import load, with_lora
from tiny import one_line
from torch import Tensor

from layerwise import Cache, LayerwiseForCausalLM, attach, from_pretrained
from layerwise.data.examples import IGNORED, Tokens, collate
from layerwise.decoding.drafters import HeadDrafter
from layerwise.decoding.judge import Pick
from layerwise.decoding.target import Target
from layerwise.model.exit_head import FILE, ExitHead
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan
from layerwise.trace import Phase, Trace
from layerwise.training import frozen
from layerwise.training.frozen import FrozenExit

VOCABULARY = [7, 3, 50, 96, 11, 20]
FULL = Plan.full(tiny.LAYERS)


def with_head(name: str = "llama", exit: int = 0, vocabulary: list[int] = VOCABULARY) -> LayerwiseForCausalLM:
    """A model with a head whose weights are random, so that every part of it matters."""
    model = attach(tiny.model(name), engine="eager")
    torch.manual_seed(1)
    model.exit_head = ExitHead(model.runtime.backbone, exit, vocabulary).eval()
    with torch.no_grad():
        for parameter in model.exit_head.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


# -- drafting is what was trained ----------------------------------------------------------------------------


def trained_logits(
    model: LayerwiseForCausalLM, texts: list[list[int]], unroll: int, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, int, int], Tensor]:
    """Logits of the training passes, by (row, position, pass)."""

    def exact(recipe: FrozenExit, input_ids: Tensor, counts: list[int]) -> list[tuple[Tensor, ...]]:
        exit, runtime = model.exit_head.exit, model.runtime
        early = embedded = model.embed(input_ids)
        if exit:
            early = runtime.forward(embedded, [FULL[:exit]] * len(counts), counts)
        deep = runtime.forward(embedded, [FULL] * len(counts), counts)
        kept = (early, deep) if exit else (deep,)
        return [tuple(one[row, :count] for one in kept) for row, count in enumerate(counts)]

    monkeypatch.setattr(FrozenExit, "_computed", exact)  # it keeps bfloat16, too coarse to compare with
    seen: list[Tensor] = []
    hook = model.exit_head.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        FrozenExit(model, unroll)(**collate([Tokens(text, [IGNORED, *text[1:]]) for text in texts], 0))
    hook.remove()
    # Positions 1 to n - 2 of each row, one after another; the first call is the teacher's.
    places = [(row, position) for row, text in enumerate(texts) for position in range(1, len(text) - 1)]
    assert len(seen) == unroll + 1 and all(len(logits) == len(places) for logits in seen[1:])
    return {
        (*place, number): logits[at] for number, logits in enumerate(seen[1:], 1) for at, place in enumerate(places)
    }


@pytest.mark.parametrize("exit", [0, 2, 5])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_drafted_token_sees_what_its_training_pass_saw(name: str, exit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting is driven along fixed texts; rows of a ragged batch accept by chance, and leave when they end."""
    rng, longest = random.Random(exit), 4
    model = with_head(name, exit)
    texts = [[rng.randrange(3, tiny.VOCABULARY) for _ in range(length)] for length in (30, 19, 26)]
    expected = trained_logits(model, texts, longest, monkeypatch)

    counts = [5, 2, 9]
    target = Target(model, [FULL] * 3, Cache(3, 8), set())
    live, read_so_far, drafted = [0, 1, 2], list(counts), 0
    logits: list[Tensor] = []

    def along_the_text(found: Tensor, vocabulary: Tensor | None, *_: object) -> Pick:
        logits.append(found)
        chosen = [texts[row][read_so_far[row] + len(logits)] for row in live]
        return Pick(torch.tensor(chosen)[:, None], [1.0] * len(live))

    drafter = HeadDrafter("head", target, model.exit_head, model.head_runtime, along_the_text)
    target.cuts |= drafter.cuts
    with torch.no_grad():
        prompt = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(t[:n]) for t, n in zip(texts, counts, strict=True)], True
        )
        drafter.begin(target.read(prompt, counts))
        while live:
            last = torch.tensor([[texts[row][read_so_far[row]]] for row in live])
            room = min(len(texts[row]) - read_so_far[row] - 1 for row in live)
            most = rng.randint(0, min(longest, room))
            logits.clear()
            tokens = drafter.propose(last, most, lambda trust: True).tokens if most else [[] for _ in live]
            for number, found in enumerate(logits):
                for at, row in enumerate(live):
                    position = read_so_far[row] + number
                    if position < len(texts[row]) - 1 and (row, position, number + 1) in expected:
                        torch.testing.assert_close(found[at], expected[row, position, number + 1], atol=1e-4, rtol=1e-4)
                        drafted += 1
            width = most + 1
            read = target.verify(
                torch.cat([last, torch.tensor(tokens).view(len(live), -1).long()], 1), [width] * len(live)
            )
            accepted = [rng.randint(0, most) for _ in live]
            target.cache.rollback([n - most + a for n, a in zip(target.cache.lengths, accepted, strict=True)])
            read.counts = [1 + a for a in accepted]
            drafter.learn(read)
            for row, count in zip(live, read.counts, strict=True):
                read_so_far[row] += count
            going = [at for at, row in enumerate(live) if read_so_far[row] < len(texts[row]) - 1]
            if going and len(going) < len(live):
                drafter.select(going)
                target.select(going)
            live = [live[at] for at in going]
    assert drafted > 30


def test_passes_differ_so_that_the_comparison_means_something(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained_logits(with_head(), [list(range(3, 20))], 3, monkeypatch)
    for position in (4, 9):
        first, second, third = (found[0, position, number] for number in (1, 2, 3))
        assert (first - second).abs().max() > 1e-2 and (second - third).abs().max() > 1e-3


# -- the head itself -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trace_counts_what_the_head_runs() -> None:
    """And a draft's own walk over the prompt as reading it."""
    model, prompt = with_head(), torch.randint(6, 97, (1, 9), generator=torch.Generator().manual_seed(4))
    model.generation_config.eos_token_id = None
    for draft, layers in (("head,2", 1), ("plan:1-4,2", 4)):
        trace = Trace()
        model.generate(prompt, max_new_tokens=8, do_sample=False, draft=draft, trace=trace)
        drafted = [span for span in trace.rows[0] if span.phase is Phase.DRAFT]
        assert {span.plan.depth for span in drafted} == {layers}, draft
        assert trace.drafted <= sum(span.tokens for span in drafted) <= trace.drafted + 2 * sum(trace.drafts.values())
        assert trace.tokens(Phase.PREFILL) == 2 * prompt.shape[1]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_cut_head_has_the_rows_of_its_vocabulary(name: str) -> None:
    model = attach(tiny.model(name))
    backbone = model.runtime.backbone
    head = ExitHead(backbone, 3, VOCABULARY)
    assert head.vocabulary.tolist() == sorted(VOCABULARY)
    state = torch.randn(2, 1, backbone.shape.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Runtime(head.backbone(backbone)).engine.logits(state)
        torch.testing.assert_close(found, backbone.logits(state)[..., sorted(VOCABULARY)])
    assert not any(parameter.requires_grad for parameter in head.head.parameters())
    assert backbone.depth == tiny.LAYERS and len(backbone.layers) == tiny.LAYERS


def test_it_proposes_tokens_of_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, proposed = with_head(), []
    propose = HeadDrafter.propose

    def spy(self: HeadDrafter, *arguments: Any) -> Any:
        proposed.append(propose(self, *arguments))
        return proposed[-1]

    monkeypatch.setattr(HeadDrafter, "propose", spy)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    model.generate(ids, max_new_tokens=9, eos_token_id=None, draft="head,3")
    tokens = {token for one in proposed for row in one.tokens for token in row}
    assert tokens and tokens <= set(VOCABULARY)


def test_base_weights_are_neither_shared_nor_changed() -> None:
    model = with_head("gemma3", 2)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    own = {parameter.data_ptr() for parameter in model.exit_head.parameters()}
    assert not own & {parameter.data_ptr() for parameter in model.base.parameters()}
    batch = collate([Tokens(list(range(3, 18)), [IGNORED] * 4 + list(range(7, 18)))], 0)
    recipe = FrozenExit(model, 2)
    optimizer = torch.optim.SGD([p for p in model.exit_head.parameters() if p.requires_grad], 0.1)
    recipe(**batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    changed = model.exit_head.fuse.weight.clone()
    optimizer.step()
    assert not torch.equal(model.exit_head.fuse.weight, changed)
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name]), name


class Elsewhere(Tensor):
    """A tensor that numpy cannot read, as one on a GPU."""

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert: copy the tensor to host memory first")

    def cpu(self, **_: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_training_reads_tokens_wherever_they_are() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    found, expected = (FrozenExit(with_head())._base_states(one, [4, 3]) for one in (ids.as_subclass(Elsewhere), ids))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("exit", [0, 2])
def test_states_are_kept_up_to_a_limit_and_else_computed_again(exit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, counts = torch.randint(3, tiny.VOCABULARY, (4, 8)), [8, 5, 8, 3]
    expected = FrozenExit(with_head(exit=exit))._base_states(ids, counts)
    width = 2 * tiny.model("llama").config.hidden_size * (2 if exit else 1)  # bytes a token: no embedding is kept
    monkeypatch.setattr(frozen, "KEPT_BYTES", 13 * width)
    recipe, computed = FrozenExit(with_head(exit=exit)), []
    real = FrozenExit._computed
    monkeypatch.setattr(
        FrozenExit, "_computed", lambda self, ids, counts: computed.append(counts) or real(self, ids, counts)
    )
    for _ in range(2):
        for ours, theirs in zip(recipe._base_states(ids, counts), expected, strict=True):
            for row, count in enumerate(counts):
                torch.testing.assert_close(ours[row, :count], theirs[row, :count], rtol=2e-2, atol=2e-2)
    assert computed == [counts, [8, 3]] and recipe._kept_bytes == 13 * width


def test_wrong_heads_are_refused() -> None:
    backbone = attach(tiny.model("llama")).runtime.backbone
    one_line(lambda: ExitHead(backbone, 6, [3]), "0 to 5", "6")
    one_line(lambda: ExitHead(backbone, -1, [3]), "0 to 5", "-1")
    one_line(lambda: ExitHead(backbone, 0, []), "at least one token")
    one_line(lambda: ExitHead(backbone, 0, [3, 97]), "tokens 0 to 96")
    one_line(lambda: ExitHead(backbone, 0, [-1, 3]), "tokens 0 to 96")


# -- saving and loading --------------------------------------------------------------------------------------


def test_saved_and_loaded_it_drafts_the_same(base: Path, tmp_path: Path) -> None:
    model = from_pretrained(str(base), engine="eager")
    torch.manual_seed(1)
    model.exit_head = ExitHead(model.runtime.backbone, 2, VOCABULARY).eval()
    with torch.no_grad():
        for parameter in model.exit_head.parameters():
            parameter.copy_(parameter.bfloat16())  # what is kept of it
    model.exits = (2, 4)
    model.save_pretrained(str(tmp_path))
    again = from_pretrained(str(tmp_path), engine="eager")
    assert again.exit_head.exit == 2 and again.exits == (2, 4)
    assert again.exit_head.vocabulary.tolist() == sorted(VOCABULARY)
    expected = {k: v for k, v in model.exit_head.state_dict().items() if not k.startswith("head.")}
    found = again.exit_head.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    backbone = again.runtime.backbone
    assert torch.equal(found["head.weight"], backbone.head.weight[sorted(VOCABULARY)])  # of the base, not of the file
    assert not again.exit_head.training and not any(p.requires_grad for p in again.exit_head.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = again.generate(ids, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(again.generate(ids, max_new_tokens=12, eos_token_id=None, draft="head"), plain)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm", "post_attention_layernorm"]}], ids=str)
def test_a_head_beside_a_lora_is_the_same_merged_or_not(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    lora = with_lora(load(base), target_modules=["q_proj", "down_proj"], **options)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    attach(lora).save_pretrained(str(tmp_path / "lora"))
    merged, apart = (from_pretrained(tmp_path / "lora", engine=engine) for engine in ("auto", "eager"))
    merged.exit_head, unmerged = (ExitHead(one.runtime.backbone, 2, VOCABULARY) for one in (merged, apart))
    for name, value in merged.exit_head.state_dict().items():
        if "norm." in name or name.startswith("layer."):
            torch.testing.assert_close(unmerged.state_dict()[name], value)
    assert any("lora_" in name for name, _ in apart.base.named_parameters())  # only the copy is merged
    merged.exits = (3,)
    merged.save_pretrained(str(tmp_path / "head"))
    again = from_pretrained(tmp_path / "head", engine="eager")
    expected, found = merged.exit_head.state_dict(), again.exit_head.state_dict()
    assert expected.keys() == found.keys() and again.exits == (3,)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = again.generate(ids, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(again.generate(ids, max_new_tokens=12, eos_token_id=None, draft="head"), plain)


def test_a_head_that_was_taken_off_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = attach(with_lora(load(base)))
    model.exit_head, model.exits = ExitHead(model.runtime.backbone, 2, VOCABULARY), (3,)
    model.save_pretrained(str(tmp_path / "head"))
    merged = from_pretrained(tmp_path / "head")
    merged.exit_head, merged.exits = None, ()
    merged.save_pretrained(str(tmp_path / "none"))
    again = from_pretrained(tmp_path / "none", engine="eager")
    assert again.exit_head is None and again.exits == ()


def test_files_that_are_no_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_head()
    backbone, file = model.runtime.backbone, tmp_path / FILE
    one_line(lambda: ExitHead.load(tmp_path, backbone), FILE, "cannot be loaded")
    model.exit_head.save(tmp_path)
    assert "head.weight" not in load_file(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    one_line(lambda: ExitHead.load(tmp_path, backbone), FILE, "cannot be loaded")
    tensors = {"vocabulary": torch.tensor([3])}
    save_file(tensors, str(file))
    one_line(lambda: ExitHead.load(tmp_path, backbone), FILE, "cannot be loaded")  # no metadata
    save_file(tensors, str(file), metadata={"exit": "0"})
    one_line(lambda: ExitHead.load(tmp_path, backbone), "another shape")  # weights are missing
    save_file({"fuse.weight": torch.zeros(2)}, str(file), metadata={"exit": "0"})
    one_line(lambda: ExitHead.load(tmp_path, backbone), FILE, "cannot be loaded")  # no vocabulary
    save_file({"vocabulary": torch.tensor([tiny.VOCABULARY])}, str(file), metadata={"exit": "0"})
    one_line(lambda: ExitHead.load(tmp_path, backbone), "tokens 0 to 96")  # the base lacks one
    other = attach(tiny.model("qwen3")).runtime.backbone
    file.write_bytes(whole)
    one_line(lambda: ExitHead.load(tmp_path, other), "another shape")
