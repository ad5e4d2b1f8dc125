"""The suite `tools-vs-planning`: does a routed model skip layers where they are not needed, and is anything lost?

Held-out prompts of four kinds (see `layerwise.data.routing`): tool calls; plans and worked solutions; requests that no
function fits; questions about functions. What is reported of each kind:

- layers and decode FLOPs skipped (LM head and attention counted), also by length of the prompt, because a router that
  tells lengths apart is not one that tells kinds apart;
- exp(CE) of the reference answers, never with a penalty in it: routed, by the same adapter with every layer run, by the
  base model, and by a LoRA trained alike without routing (`reference`);
- what other ways to skip as much would cost, as many weights left out over the same prompts: `static`, where gates
  close most often, as much for every prompt as can be; `random`, by gates drawn for each prompt; `shuffled`, each
  prompt by the routes of SHUFFLES others, which count by their mean. Intervals are of the difference of the mean CE,
  by bootstrap over prompts.

And what comes of it when text is generated: right tool calls, right results, lengths, reasons to stop, time.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

import torch

from layerwise.benchmarks.environment import environment
from layerwise.cost import Cost, ModelShape, decode_cost, head_run, layers_run
from layerwise.data import collate, length_sorted_batches, load, tokenize
from layerwise.data.routing import side
from layerwise.evaluation.intervals import interval
from layerwise.evaluation.routed_answers import Asked, answer_quality, same_lora, timed
from layerwise.hub import base_name, from_pretrained
from layerwise.plan import Plan, Visit
from layerwise.policies.gates import GatedPolicy
from layerwise.sources import fast_dtype, load_tokenizer
from layerwise.training.exit_loss import labelled
from layerwise.training.runs import RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM

SIDES = ("tools", "planning", "irrelevance", "questions")
BATCH_TOKENS = 2048
SHUFFLES = 8
BUCKETS = (0, 128, 192, 256, 384, 1024)  # tokens of the prompt, from one to below the next


def held_out(tokenizer: PreTrainedTokenizerBase, samples: int, most_tokens: int, seed: int) -> list[Asked]:
    """`samples` test examples of tools and of planning, a third as many of the other kinds, drawn by `seed`."""
    asked: list[Asked] = []
    for name in SIDES:
        examples = load(name, "test")
        wanted = samples if name in ("tools", "planning") else -(-samples // 3)
        for example in random.Random(f"{name} {seed}").sample(examples, len(examples)):
            if not wanted:
                break
            tokens = tokenize(example, tokenizer, most_tokens)
            if tokens is not None:
                asked.append(Asked(example, tokens, side(example.kind)))
                wanted -= 1
    return asked


# -- cross entropy -----------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_losses(
    model: LayerwiseForCausalLM, asked: Sequence[Asked], pad: int, plans: Sequence[Plan] | None = None
) -> tuple[list[float], list[Plan]]:
    """Cross entropy of each answer, nats a token, and the plan it ran by: of `plans`, or what the policy decides."""
    losses, ran = [0.0] * len(asked), [Plan.full(model.depth)] * len(asked)
    backbone = model.runtime.backbone
    for group in length_sorted_batches([len(one.tokens.input_ids) for one in asked], BATCH_TOKENS):
        batch = collate([asked[at].tokens for at in group], pad)
        counts = [len(asked[at].tokens.input_ids) for at in group]
        lengths = [asked[at].tokens.prompt_length for at in group]
        walked = model.decide(lengths, None if plans is None else [plans[at] for at in group])
        hidden = model.runtime.forward(model.embed(batch["input_ids"]), walked, counts)
        for row, at in enumerate(group):
            where, targets = labelled(batch["labels"][row : row + 1].to(hidden.device), [counts[row]])
            ran[at] = walked[row] if isinstance(walked, Sequence) else walked.plans[row]
            logits = backbone.logits(hidden[row, where], ran[at].thin_head).float()
            losses[at] = torch.nn.functional.cross_entropy(logits, targets).item()
    return losses, ran


class Losses:
    """The cross entropies of answers by one model; what an answer loses by a plan is measured once."""

    def __init__(self, model: LayerwiseForCausalLM, asked: Sequence[Asked], pad: int) -> None:
        self.model, self.asked, self.pad = model, asked, pad
        self._known: dict[tuple[int, Plan], float] = {}

    def decided(self) -> tuple[list[float], list[Plan]]:
        """Of every answer, and the plans that the policy decides for."""
        losses, plans = answer_losses(self.model, self.asked, self.pad)
        self._known.update(zip(enumerate(plans), losses, strict=True))
        return losses, plans

    def by(self, plans: Sequence[Plan], chosen: Sequence[int] | None = None) -> list[float]:
        """Of the `chosen` answers (by number; all if None), each by its plan."""
        wanted = list(zip(range(len(self.asked)) if chosen is None else chosen, plans, strict=True))
        missing = [one for one in dict.fromkeys(wanted) if one not in self._known]
        if missing:
            losses, _ = answer_losses(
                self.model, [self.asked[at] for at, _ in missing], self.pad, [plan for _, plan in missing]
            )
            self._known.update(zip(missing, losses, strict=True))
        return [self._known[one] for one in wanted]


def decode_flops(model: LayerwiseForCausalLM, one: Asked, plan: Plan) -> int:
    """FLOPs of generating the example's answer after its prompt, LM head included."""
    prompt = one.tokens.prompt_length
    cost: Cost = decode_cost(model.runtime.backbone.shape, plan, prompt, len(one.tokens.input_ids) - prompt)
    return cost.flops


def perplexity(losses: Sequence[float], chosen: Sequence[int]) -> float:
    """exp of the mean over the chosen answers, each answer counting once."""
    return math.exp(sum(losses[at] for at in chosen) / len(chosen))


# -- controls ----------------------------------------------------------------------------------------------------


def control_plans(
    plans: Sequence[Plan], policy: GatedPolicy, shape: ModelShape, seed: int
) -> dict[str, list[list[Plan]]]:
    """For each control a plan for each prompt, and that once or more; each leaves out as many weights over all prompts
    as `plans` do, give or take those of a layer or the head, and leaves of it what the policy does.

    Static and random leave out as much for every prompt, give or take one gate: that a prompt bears more is what
    routers have to find out.
    """
    chance = random.Random(seed)
    skipped = [_closed(plan, policy) for plan in plans]
    free = sorted(policy.free, key=lambda gate: -sum(gate in those for those in skipped))
    full = _weights_run(shape, Plan.full(policy.layers))
    saved = {gate: full - _weights_run(shape, policy.plan([gate])) for gate in free}

    def closed(order: Sequence[int], due: float) -> tuple[Plan, float]:
        """The plan that closes gates in this order, but for those that would save more than twice what is owed."""
        those = []
        for gate in order:
            if due >= saved[gate] / 2:
                those.append(gate)
                due -= saved[gate]
        return policy.plan(those), due

    def as_much(orders: Sequence[Sequence[int]]) -> list[Plan]:
        """A plan for each of these orders; what one leaves out too much or too little, the next ones make good."""
        share, owed, made = sum(saved[gate] for those in skipped for gate in those) / len(plans), 0.0, []
        for order in orders:
            plan, owed = closed(order, owed + share)
            made.append(plan)
        return made

    static, drawn = as_much([free] * len(plans)), as_much([chance.sample(free, len(free)) for _ in plans])
    shuffles = [chance.sample(plans, len(plans)) for _ in range(SHUFFLES)]
    return {"static": [static], "random": [drawn], "shuffled": shuffles}


def _closed(plan: Plan, policy: GatedPolicy) -> list[int]:
    """The gates that were closed where this plan came out; that of the head is the one after the last layer's."""
    layers = [layer for layer in range(policy.layers) if Visit(layer) not in plan.visits]
    return [*layers, policy.layers] if plan.thin_head else layers


def _weights_run(shape: ModelShape, plan: Plan) -> float:
    """What a plan multiplies by for one token, head included, in layers' worth of weights."""
    layer = shape.layers[0].attention_weights + shape.layers[0].mlp_weights
    return layers_run(shape, plan) + shape.head_weights(plan) / layer


def controls(losses: Losses, routed: Sequence[float], plans: Sequence[Plan], seed: int) -> dict[str, dict[str, Any]]:
    """Each control's exp(CE) over tool calls and planning, and how much more nats a token it costs than the routes.

    Args:
        routed, plans: what the answers lose along the routes, and these.
    """
    chosen = [at for at, one in enumerate(losses.asked) if one.side in ("tools", "planning")]
    model, found = losses.model, {}
    assert isinstance(model.policy, GatedPolicy)
    shape = model.runtime.backbone.shape
    for name, draws in control_plans([plans[at] for at in chosen], model.policy, shape, seed).items():
        theirs = [mean(each) for each in zip(*(losses.by(other, chosen) for other in draws), strict=True)]
        worse = [their - routed[at] for their, at in zip(theirs, chosen, strict=True)]
        every = [plan for other in draws for plan in other]
        found[name] = {
            "layers_run": mean(layers_run(shape, plan) for plan in every),
            "head_run": mean(head_run(shape, plan) for plan in every),
            "ppl": math.exp(mean(theirs)),
            "ce_above_routed": mean(worse),
            "interval": interval(worse),
        }
    return found


# -- the suite ---------------------------------------------------------------------------------------------------


def routing_suite(
    adapter: str | Path,
    model: str | None = None,
    reference: str | Path | None = None,
    samples: int = 60,
    answers: int = 0,
    time_prompts: int = 0,
    most_tokens: int = 384,
    seed: int = 0,
    command: str = "",
    device: torch.device | str = "cpu",
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a routed adapter; see the module. Cross entropies are computed eagerly, in `fast_dtype`.

    Args:
        reference: an adapter of the same size, data and budget, trained without routing; ratios need it.
        samples: held-out examples of tools and of planning each.
        answers: of how many tool calls and word problems to generate answers; 0 leaves that out.
        time_prompts: on how many tool calls to time decoding; 0 leaves that out.
        most_tokens: longer examples are left out.
        seed: which examples, and the controls' chance.
        command: only noted in the result.
        device: that models are loaded on.

    Raises:
        ValueError: the adapter has no gates.
    """
    began = time.perf_counter()
    base, dtype = base_name(model, adapter), fast_dtype(device)
    tokenizer = load_tokenizer(base)
    routed = from_pretrained(model, adapter=adapter, dtype=dtype, engine="eager", device=device).eval()
    if not isinstance(routed.policy, GatedPolicy):
        raise ValueError(f"the adapter '{adapter}' has no gates: train one with 'layerwise train layerroute'")
    pad = tokenizer.pad_token_id or 0
    asked = held_out(tokenizer, samples, most_tokens, seed)
    losses = Losses(routed, asked, pad)
    by: dict[str, list[float]] = {}
    by["routed"], plans = losses.decided()
    notify(f"routed: {len(asked)} answers")
    by["full_depth"] = losses.by([Plan.full(routed.depth)] * len(asked))
    notify("full depth: done")
    others: dict[str, str | Path | None] = {"base": None}
    if reference is not None and same_lora(adapter, reference):  # then it is what runs at full depth
        by["reference"] = by["full_depth"]
    elif reference is not None:
        others["reference"] = reference
    for name, other in others.items():
        loaded = from_pretrained(base, adapter=other, dtype=dtype, engine="eager", device=device).eval()
        by[name], _ = answer_losses(loaded, asked, pad)
        notify(f"{name}: done")
    found: dict[str, Any] = {
        "suite": "tools-vs-planning",
        "adapter": Path(adapter).name,
        "reference": None if reference is None else Path(reference).name,
        **_trained_as(adapter),
        **_skips(routed, asked, plans, by),
        "controls": controls(losses, by["routed"], plans, seed),
        **layer_use(asked, plans, routed.runtime.backbone.shape),
    }
    notify("controls: done")
    if answers:
        found["generated"] = answer_quality(routed.depth, model, adapter, reference, tokenizer, asked, answers, device)
        notify("answers: done")
    found["time_realised"] = None
    if time_prompts:
        found["time"] = timed(adapter, model, asked, time_prompts, device=device)
        found["time_realised"] = found["time"]["realised"]
    return found | {
        "samples": samples,
        "dtype": dtype,
        "sample_seed": seed,
        "command": command,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


def _trained_as(adapter: str | Path) -> dict[str, Any]:
    """What tells trainings apart in the results, as the training noted it."""
    try:
        config = json.loads((Path(adapter) / RECORD).read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        config = {}
    named = ("objective", "seed", "bridge_rank", "leave", "neurons", "mend_rank", "head_rank")
    return {name: config.get(name) for name in named}


def _skips(
    model: LayerwiseForCausalLM, asked: Sequence[Asked], plans: Sequence[Plan], by: dict[str, list[float]]
) -> dict[str, Any]:
    """Skip rates and exp(CE) by kind and by length; rates in percent."""
    full, shape = Plan.full(model.depth), model.runtime.backbone.shape
    whole = [decode_flops(model, one, full) for one in asked]
    ran = [decode_flops(model, one, plan) for one, plan in zip(asked, plans, strict=True)]

    def of(chosen: list[int]) -> dict[str, Any]:
        layers = sum(layers_run(shape, plans[at]) for at in chosen) / len(chosen)
        return {
            "n": len(chosen),
            "layers_run": layers,
            "layer_skip": 100 * (1 - layers / model.depth),
            "head_skip": 100 * (1 - sum(head_run(shape, plans[at]) for at in chosen) / len(chosen)),
            "flop_skip": 100 * (1 - sum(ran[at] for at in chosen) / sum(whole[at] for at in chosen)),
            "ppl": {name: perplexity(losses, chosen) for name, losses in by.items()},
        }

    kinds = {name: [at for at, one in enumerate(asked) if one.side == name] for name in SIDES}
    found = {name: of(chosen) for name, chosen in kinds.items() if chosen}
    lengths = {
        f"{low}-{high - 1}": {
            name: of(inside)
            for name in ("tools", "planning")
            if (inside := [at for at in kinds[name] if low <= asked[at].tokens.prompt_length < high])
        }
        for low, high in pairwise(BUCKETS)
    }
    tools, planning = found["tools"], found["planning"]

    def ratio(kind: dict[str, Any]) -> float | None:
        return kind["ppl"]["routed"] / kind["ppl"]["reference"] if "reference" in by else None

    return {
        "tool_skip": tools["flop_skip"],
        "planning_skip": planning["flop_skip"],
        "differential": tools["flop_skip"] - planning["flop_skip"],
        "tool_ppl_ratio": ratio(tools),
        "planning_ppl_ratio": ratio(planning),
        "kinds": found,
        "by_length": {name: those for name, those in lengths.items() if those},
    }


def layer_use(asked: Sequence[Asked], plans: Sequence[Plan], shape: ModelShape) -> dict[str, dict[str, Any]]:
    """Of each kind, the share of prompts that run each layer (`layer_use`), and the LM head (`head_use`); one that runs
    in part counts by its share of weights."""
    layers, head = {}, {}
    for name in SIDES:
        those = [plan for plan, one in zip(plans, asked, strict=True) if one.side == name]
        if those:
            each = range(len(shape.layers))
            layers[name] = [sum(layers_run(shape, plan, layer) for plan in those) / len(those) for layer in each]
            head[name] = sum(head_run(shape, plan) for plan in those) / len(those)
    return {"layer_use": layers, "head_use": head}
