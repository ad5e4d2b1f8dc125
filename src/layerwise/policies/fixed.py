"""The simplest policy, and what every policy is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from layerwise.plan import Plan


class Policy(Protocol):
    """Decides the plan of each row of a batch, once per prompt."""

    def plans(self, rows: int) -> Sequence[Plan]:
        """One plan a row."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `layerwise.json` of an adapter keeps."""
        ...


@dataclass(frozen=True)
class FixedPolicy:
    """The same plan for every row."""

    plan: Plan

    def plans(self, rows: int) -> tuple[Plan, ...]:
        return (self.plan,) * rows

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "fixed", "plan": str(self.plan)}


def policy_from_dict(saved: dict[str, Any], layers: int) -> Policy:
    """Read back `Policy.to_dict`.

    Raises:
        ValueError: a kind of policy that this version does not know, or a plan the model cannot run.
    """
    if saved.get("kind") != "fixed":
        raise ValueError(f"unknown policy '{saved.get('kind')}': the adapter needs a newer layerwise")
    if not isinstance(saved.get("plan"), str):
        raise ValueError("the adapter's policy holds no plan: save the adapter again")
    return FixedPolicy(Plan.parse(saved["plan"], layers))
