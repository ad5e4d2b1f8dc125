"""The simplest policy, and what every policy is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from layerwise.plan import Plan, Route


class Policy(Protocol):
    """Decides the plan of each row of a batch, once per prompt."""

    def plans(self, rows: int) -> Sequence[Plan]:
        """One plan a row."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `layerwise.json` of an adapter keeps."""
        ...


@runtime_checkable
class RoutingPolicy(Policy, Protocol):
    """A policy that must see hidden states of the prompt: it decides while the pass over the prompt runs.

    Its `plans` raises ValueError, for there is no prompt to decide from.
    """

    def route(self, lengths: Sequence[int]) -> Route:
        """For one pass over rows whose prompts are their first `lengths[r]` tokens; nothing later is looked at."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `to_dict` leaves out."""
        ...


def decide(policy: Policy, lengths: Sequence[int]) -> list[Plan] | Route:
    """The plan of each row, or the route by which a pass over the rows' prompts, `lengths` tokens each, finds them."""
    return policy.route(lengths) if isinstance(policy, RoutingPolicy) else list(policy.plans(len(lengths)))


@dataclass(frozen=True)
class FixedPolicy:
    """The same plan for every row."""

    plan: Plan

    def plans(self, rows: int) -> tuple[Plan, ...]:
        return (self.plan,) * rows

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "fixed", "plan": str(self.plan)}


def policy_from_dict(saved: dict[str, Any], layers: int, folder: str | Path | None = None) -> Policy:
    """Read back `Policy.to_dict`, and from `folder` what the policy wrote beside it.

    Raises:
        ValueError: a kind of policy that this version does not know, a plan that names layers the model lacks, or a
            file that is missing or does not fit.
    """
    if saved.get("kind") == "gated" and folder is not None:
        from layerwise.policies.gates import GatedPolicy

        return GatedPolicy.load(saved, layers, folder)
    if saved.get("kind") == "router" and folder is not None:
        from layerwise.policies.router import load_router

        return load_router(saved, layers, folder)
    if saved.get("kind") != "fixed":
        raise ValueError(f"unknown policy '{saved.get('kind')}': the adapter needs a newer layerwise")
    if not isinstance(saved.get("plan"), str):
        raise ValueError("the adapter's policy holds no plan: save the adapter again")
    return FixedPolicy(Plan.parse(saved["plan"], layers))
