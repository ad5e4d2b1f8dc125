"""What routers read, computed once and kept on disk.

Teacher forcing without its cost: the labelled path of a question is walked once, by the route that a trained router
takes (`PerLayerRoute`), and what entered each layer is written down. So what is trained on is what is run on.

Features of `SHARD` prompts are a file. A run that was stopped goes on with the prompt after the last complete file;
the folder is named after all that the features depend on, so other labels or another model never meet old files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.data import length_sorted_batches
from layerwise.evaluation.margins import short_digest
from layerwise.model.causal_lm import LayerwiseForCausalLM
from layerwise.model.fingerprint import fingerprint
from layerwise.model.packing import padded
from layerwise.plan import Plan
from layerwise.policies import RoutingPolicy
from layerwise.policies.router import PerLayerRoute, summary

SHARD = 128  # prompts
BATCH_TOKENS = 2048


@torch.no_grad()
def path_windows(
    model: LayerwiseForCausalLM, prompts: Sequence[Sequence[int]], classes: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """What enters each layer when prompt i walks the path of `classes[i]`.

    Returns:
        Window means (prompts, layers, windows, d) and shares (prompts, windows), as `policies.router.windows`.
    """
    ids, counts = padded(prompts)
    means: list[Tensor] = []
    shares: list[Tensor] = []

    def forced(layer: int, entering: Tensor, share: Tensor) -> list[int]:
        means.append(entering)
        shares.append(share)
        return [own[layer] for own in classes]

    model.runtime.forward(model.embed(ids), PerLayerRoute(model.depth, counts, forced), counts)
    return torch.stack(means, 1), shares[0]


@torch.no_grad()
def menu_reads(model: LayerwiseForCausalLM, prompts: Sequence[Sequence[int]], shared: Plan) -> Tensor:
    """What a menu reads after the visits `shared`: (prompts, 2 d), as `policies.router.summary`."""
    ids, counts = padded(prompts)
    return summary(model.runtime.forward(model.embed(ids), [shared] * len(prompts), counts), counts)


def kept_features(
    folder: Path,
    model: LayerwiseForCausalLM,
    prompts: Sequence[Sequence[int]],
    paths: Sequence[Any],
    compute: Callable[[list[Sequence[int]], list[Any]], dict[str, Tensor]],
    notify: Callable[[str], None],
) -> dict[str, Tensor]:
    """Features of all prompts, half precision: normalised states are at most the square root of d.

    Args:
        folder: files go into a folder in it.
        prompts, paths: token ids, and what else decides a prompt's features (anything that JSON can write).
        compute: named tensors of a batch of prompts and their paths, one entry a prompt.
        notify: gets a line for each file.
    """
    from safetensors.torch import load_file, save_file

    about = [fingerprint(model.runtime.backbone.model, adapted=True), str(model.runtime.backbone.dtype), prompts, paths]
    own = folder / f"features-{short_digest(about)}"
    own.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = []
    began, made = time.perf_counter(), 0
    for start in range(0, len(prompts), SHARD):
        file, part = own / f"{start:06d}.safetensors", range(start, min(start + SHARD, len(prompts)))
        if not file.exists():
            tensors = _in_batches([prompts[at] for at in part], [paths[at] for at in part], compute)
            save_file(tensors, str(file.with_suffix(".part")))
            file.with_suffix(".part").rename(file)  # complete or not there
            made += len(part)
            left = (len(prompts) - part.stop) * (time.perf_counter() - began) / made
            notify(f"features of {part.stop} of {len(prompts)} prompts ({left / 60:.0f} min left)")
        shards.append(load_file(str(file)))
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def _in_batches(
    prompts: list[Sequence[int]],
    paths: list[Any],
    compute: Callable[[list[Sequence[int]], list[Any]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """`compute` on batches of similar length, put back into order."""
    groups = length_sorted_batches([len(ids) for ids in prompts], BATCH_TOKENS)
    found = [compute([prompts[at] for at in group], [paths[at] for at in group]) for group in groups]
    back = torch.argsort(torch.tensor([at for group in groups for at in group]))
    return {name: torch.cat([one[name].half().cpu() for one in found])[back] for name in found[0]}


@torch.no_grad()
def decided_plans(model: LayerwiseForCausalLM, policy: RoutingPolicy, prompts: Sequence[Sequence[int]]) -> list[Plan]:
    """The plan that `policy` decides for each prompt, by passes over batches of them."""
    plans: list[Plan | None] = [None] * len(prompts)
    for group in length_sorted_batches([len(ids) for ids in prompts], BATCH_TOKENS):
        ids, counts = padded([prompts[at] for at in group])
        route = policy.route(counts)
        model.runtime.forward(model.embed(ids), route, counts)
        for at, plan in zip(group, route.plans, strict=True):
            plans[at] = plan
    return plans
