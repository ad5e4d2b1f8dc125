"""The one loop over layers.

Prefill, decoding, drafting, verifying, search, training and serving all call `Runtime.run`. It is told which layer
calls to make, makes them in that order, and knows no method by name:

    for step in steps:
        hidden[step.rows] = engine(step.visit, hidden[step.rows], slot of the visit)

`steps` may be any iterable, also a generator that is shown the hidden states (`observe`) before it yields the next
step: that is how a router decides about a layer from the state that enters it, and how training collects the exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from layerwise.model.backbone import TESTED, Backbone, UnsupportedModelError
from layerwise.model.cache import Cache
from layerwise.model.frame import Frame
from layerwise.model.modes import evaluating
from layerwise.plan import Part, Plan, Route, Step, schedule
from layerwise.trace import Phase, Trace


class Engine(Protocol):
    """How one layer call, and the head, are computed. Every engine must equal `EagerEngine`."""

    name: str
    idle_tokens: int  # up to so many tokens of a pass, rows without a token are better carried along than left out

    def prepare(self, plans: Iterable[Plan], few: bool = False) -> None:
        """Make ready whatever takes long, before `plans` are decoded with; a `few` tokens at a time too."""
        ...

    def refresh(self) -> None:
        """Forget what was made of parameters that the model no longer has."""
        ...

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        """Run the visit on the rows of `step`: (rows, width, hidden size) to the same shape."""
        ...

    def walk(self, steps: Sequence[Step], first: int, hidden: Tensor, frame: Frame) -> tuple[Tensor, int]:
        """Run as many of the steps from number `first` on as one call can take; the states, and how many those are,
        maybe 0."""
        ...

    def greedy(self, token: int, plan: Plan, cache: Cache) -> int | None:
        """The likeliest token after one more token of a cache's only row, in one call; its slots get that. None if it
        takes more calls than one."""
        ...

    def logits(self, hidden: Tensor, thin: bool = False) -> Tensor:
        """Final norm and head, or thin head: (..., hidden size) to (..., vocabulary)."""
        ...


class EagerEngine:
    """The reference: calls the Hugging Face modules as they are."""

    name = "eager"
    idle_tokens = 0

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def prepare(self, plans: Iterable[Plan], few: bool = False) -> None:
        pass

    def refresh(self) -> None:
        pass

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        layer = step.visit.layer
        if step.visit.part is Part.BRIDGE:
            return self.backbone.module(step.visit)(hidden)
        attends = step.visit.attends
        return self.backbone.module(step.visit)(
            hidden,
            attention_mask=frame.mask(layer, step.slot, step.rows) if attends else None,
            position_ids=frame.positions(step.rows),
            past_key_values=frame.view(step.slot, step.rows),
            use_cache=frame.cache is not None,
            position_embeddings=frame.rotary(layer, step.rows),
        )

    def walk(self, steps: Sequence[Step], first: int, hidden: Tensor, frame: Frame) -> tuple[Tensor, int]:
        return hidden, 0

    def greedy(self, token: int, plan: Plan, cache: Cache) -> int | None:
        return None

    def logits(self, hidden: Tensor, thin: bool = False) -> Tensor:
        return self.backbone.logits(hidden, thin)


class Runtime:
    """A backbone and the engine that runs it. Holds no state of any sequence: that is in the cache and the trace."""

    def __init__(self, backbone: Backbone, engine: Engine | None = None) -> None:
        self.backbone = backbone
        self.engine = engine or EagerEngine(backbone)

    def run(
        self,
        hidden: Tensor,
        steps: Iterable[Step],
        frame: Frame,
        trace: Trace | None = None,
        observe: Callable[[Step, Tensor], None] | None = None,
    ) -> Tensor:
        """Walk `steps`: (rows, width, hidden size) to the same shape, before the final norm.

        `observe` gets each step with the hidden states of all rows after it, before the next step is asked for.
        """
        calls = 0
        if observe is None:  # nobody looks in between
            steps = tuple(steps)
            while calls < len(steps):
                hidden, walked = self.engine.walk(steps, calls, hidden, frame)
                if not walked:
                    hidden = self._after(steps[calls], hidden, frame)
                calls += max(walked, 1)
        else:
            for step in steps:
                hidden = self._after(step, hidden, frame)
                calls += 1
                observe(step, hidden)
        if trace is not None:
            trace.calls += calls
        return hidden

    def _after(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        if step.rows is None:
            return self.engine.visit(step, hidden, frame)
        index = frame.index(step.rows)
        return hidden.index_copy(0, index, self.engine.visit(step, hidden[index], frame))

    def forward(
        self,
        embedded: Tensor,
        plans: Sequence[Plan] | Route,
        counts: Sequence[int] | None = None,
        cache: Cache | None = None,
        trace: Trace | None = None,
        phase: Phase = Phase.PREFILL,
        visits: slice | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """One pass over a batch packed to the left.

        Args:
            embedded: (rows, width, hidden size) input embeddings; columns from counts[r] on are padding.
            plans: the plan of each row, or a route that decides them on the way; the cache then keeps its plans.
            counts: tokens of each row in this pass (all `width` if None); rows with 0 are left alone.
            cache: continued and extended in place if given.
            trace: gets what ran.
            visits: only these visits of the plan, which must be the same for all rows. They keep the slots they
                have in the whole plan, so a pass may be cut in two: `[:c]`, then `[c:]` on what the first gave.
            parents: the tokens of each row are a tree, see `Frame`; the caller has the cache `retain` one branch.

        Returns:
            Hidden states before the final norm, (rows, width, hidden size); padding columns are undefined.
        """
        rows, width, _ = embedded.shape
        counts = [width] * rows if counts is None else counts
        frame = Frame(self.backbone, counts, width, embedded.device, embedded.dtype, cache, parents)
        route = None if isinstance(plans, Sequence) else plans
        steps = schedule(tuple(plans)) if route is None else route.steps(embedded)
        if visits is not None:
            assert _same_visits(plans), "only a plan that all rows share can be cut"
            steps = steps[visits]
        if 0 in counts:
            assert route is None, "every row has a prompt"
            carried = cache is not None and _same_visits(plans) and rows * width <= self.engine.idle_tokens
            if not carried:
                steps = _without(steps, {row for row, count in enumerate(counts) if count == 0}, rows)
        try:
            hidden = self.run(embedded, steps, frame, trace, None if route is None else route.observe)
        except BaseException:  # Ctrl-C too: what the first layers stored must not outlive the pass
            if cache is not None:
                cache.rollback(cache.lengths)
            raise
        if cache is not None:
            cache.advance(counts)
        if route is not None:
            plans = route.plans
            if cache is not None:
                cache.plans = list(plans)
        if trace is not None:
            for row, (plan, count) in enumerate(zip(plans, counts, strict=True)):
                ran = plan if visits is None else plan.visits[visits]
                if ran:
                    trace.record(row, plan if visits is None else Plan(ran, plan.thin_head), phase, count)
        return hidden

    def greedy(self, token: int, plan: Plan, cache: Cache, trace: Trace | None = None) -> int | None:
        """The likeliest token after `token`, which continues the only row of `cache`: `forward` and `logits` of one
        token, and the choice, where the engine does all of it in one call; else None, and nothing has happened."""
        found = self.engine.greedy(token, plan, cache)
        if found is not None:
            cache.advance([1])
            if trace is not None:
                trace.calls += len(plan)
                trace.record(0, plan, Phase.DECODE, 1)
        return found

    def logits(self, hidden: Tensor, plans: Sequence[Plan]) -> Tensor:
        """The logits of each row (rows, ..., hidden size) by the head of its plan: (rows, ..., vocabulary)."""
        thin = [plan.thin_head for plan in plans]
        if len(set(thin)) == 1:
            return self.engine.logits(hidden, thin[0])
        rows = {which: [row for row, other in enumerate(thin) if other == which] for which in (False, True)}
        parts = [self.engine.logits(hidden[those], which) for which, those in rows.items()]
        order = torch.tensor([*rows[False], *rows[True]], device=hidden.device).argsort()
        return torch.cat([part.to(parts[0].dtype) for part in parts])[order]


def _same_visits(plans: Iterable[Plan]) -> bool:
    """Whether these plans differ in their heads at most."""
    return len({plan.visits for plan in plans}) == 1


def _without(steps: Iterable[Step], idle: set[int], rows: int) -> list[Step]:
    """The steps for the rows that are not idle."""
    kept = []
    for step in steps:
        active = tuple(r for r in (range(rows) if step.rows is None else step.rows) if r not in idle)
        if active:
            kept.append(Step(step.visit, step.slot, active))
    return kept


@torch.no_grad()
def check_fit(backbone: Backbone) -> None:
    """Compare the logits of eight tokens, read at once and the last after the others, with the model's own forward.

    Raises:
        UnsupportedModelError: the model does more than embedding, layers, norm and head.
    """
    model, name = backbone.model, backbone.name
    try:
        with evaluating(model):
            # Not the first ids: they may be special tokens, and what a model makes of a row of those hangs on rounding.
            tokens = torch.arange(1, 9, device=backbone.device)[None] * 7919 % backbone.embedding.weight.shape[0]
            expected = model(input_ids=tokens, use_cache=False).logits.float()
            embedded, plans, cache = backbone.embedding(tokens), [Plan.full(backbone.depth)], Cache(1, 8)
            forward = Runtime(backbone).forward
            passes = [forward(embedded, plans)]
            passes += [forward(part, plans, None, cache) for part in (embedded[:, :7], embedded[:, 7:])]
            found = backbone.logits(torch.cat(passes, 1)).float()
            expected = torch.cat([expected, expected], 1)
            _ = backbone.shape  # what costs are computed from
    except Exception as error:  # whatever a foreign model raises, the user must learn which model it was
        raise UnsupportedModelError(f"{name} does not fit: calling its layers failed ({error}); {TESTED}") from error
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    # Of all logits together: rounding to bfloat16 moves single ones of a trained adapter by more than the tolerance.
    gap = ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    if not gap <= tolerance:
        raise UnsupportedModelError(
            f"{name} does not fit: its forward does more than embedding, layers, norm and head "
            f"(logits differ by {gap:.1%}); {TESTED}"
        )
