"""Policies decide plans. They never touch a model's modules; the runtime knows none of them by name."""

from layerwise.policies.fixed import FixedPolicy, Policy, RoutingPolicy, decide

__all__ = ["FixedPolicy", "Policy", "RoutingPolicy", "decide"]
