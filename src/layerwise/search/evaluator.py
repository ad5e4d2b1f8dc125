"""How good many plans are for one question, at the price of few.

Plans of one question begin alike, and two plans have the same states as long as they made the same visits. So the
states after every visit are kept in a trie of visits, and a plan starts where it first differs from all that ran
before it. Plans whose next visit is of the same layer are one batch. The head runs only where a token of a choice is
predicted. `reference.plain_margin` is the slow way, which this must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.data.short_answers import Question
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan, Step, Visit
from layerwise.search.packed import PackedChoices, PackedFrame, choice_rows, margin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM

BATCH_TOKENS = 4096
BATCH_LOGITS = 2**24
KEPT_BYTES = 2**29  # of states; beyond that paths are walked, but not remembered


class _State:
    """The states (width, hidden size) after a sequence of visits, and those after one more."""

    __slots__ = ("hidden", "next")

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.next: dict[Visit, _State] = {}


class PathEvaluator:
    """Scores plans for one question.

    Args:
        model: in evaluation mode; layers are run eagerly, whatever engine it decodes with.
        prompt: one of the question's variants, instead of its own prompt.
        written: of a question whose answer is generated, what counts is whether the model writes it, greedily; its
            choices are not looked at. The row is shorter, too.

    Raises:
        ValueError: prompt and choices are longer than the model's context.
    """

    def __init__(
        self,
        model: LayerwiseForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        question: Question,
        prompt: str | None = None,
        written: bool = False,
    ) -> None:
        self.question = question
        self.written = written and question.generated
        choices = (question.answer,) if self.written else question.choices
        rows, prompt_tokens = choice_rows(tokenizer, question.prompt if prompt is None else prompt, choices)
        self.packed = PackedChoices.of(rows, prompt_tokens)
        backbone = model.runtime.backbone
        longest = max(map(len, rows))
        if backbone.context is not None and longest > backbone.context:
            raise ValueError(
                f"question '{question.id}' has {longest} tokens, more than the model's context of {backbone.context}"
            )
        self.runtime = Runtime(backbone)
        self.frame = PackedFrame(backbone, self.packed)
        with torch.inference_mode():
            ids = torch.tensor(self.packed.ids, device=backbone.device)
            self._root = _State(backbone.embedding(ids))
        self._kept = 0
        self._known: dict[Plan, float] = {}

    @torch.inference_mode()
    def margins(self, plans: Sequence[Plan]) -> list[float]:
        """The margin of the right choice, in nats (see `packed.margin`), along each plan.

        Of a written answer: the least margin of a token of it over all others, positive if greedy decoding gives it.
        """
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._known]
        if new:
            states = self._walk(new)
            size = max(1, BATCH_LOGITS // (len(self.packed.targets) * self.runtime.backbone.head.weight.shape[0]))
            for at in range(0, len(new), size):
                found = self._margins(torch.stack([state.hidden for state in states[at : at + size]]))
                self._known.update(zip(new[at : at + size], found, strict=True))
        return [self._known[plan] for plan in plans]

    def _walk(self, plans: Sequence[Plan]) -> list[_State]:
        """The states at the end of each plan."""
        states = [self._root] * len(plans)
        walked = [0] * len(plans)
        while True:
            for number, plan in enumerate(plans):
                while walked[number] < len(plan) and (after := states[number].next.get(plan.visits[walked[number]])):
                    states[number] = after
                    walked[number] += 1
            waiting = [number for number, plan in enumerate(plans) if walked[number] < len(plan)]
            if not waiting:
                return states
            # The lowest layer first, so that plans that repeated one catch up and share the next call.
            visit = min(plans[number].visits[walked[number]] for number in waiting)
            those = [number for number in waiting if plans[number].visits[walked[number]] == visit]
            befores = list({id(states[number]): states[number] for number in those}.values())
            afters = dict(zip(map(id, befores), self._visit(visit, befores), strict=True))
            for number in those:
                states[number] = afters[id(states[number])]
                walked[number] += 1

    def _visit(self, visit: Visit, befores: Sequence[_State]) -> list[_State]:
        """Run one layer from each of `befores`, and remember where that led."""
        afters: list[_State] = []
        size = max(1, BATCH_TOKENS // len(self.packed))
        for at in range(0, len(befores), size):
            batch = torch.stack([state.hidden for state in befores[at : at + size]])
            afters += map(_State, self.runtime.run(batch, (Step(visit, None),), self.frame).unbind())
        for before, after in zip(befores, afters, strict=True):
            if self._kept < KEPT_BYTES:
                before.next[visit] = after
                self._kept += after.hidden.nbytes
        return afters

    def _margins(self, hidden: Tensor) -> list[float]:
        """The margin of each plan, from last states (plans, width, hidden size)."""
        packed, device = self.packed, hidden.device
        columns, at = torch.tensor(packed.predictors, device=device).unique(return_inverse=True)
        logits = self.runtime.backbone.logits(hidden[:, columns]).float()
        targets = torch.tensor(packed.targets, device=device)
        found = logits[:, at, targets]
        if self.written:
            others = logits[:, at].scatter(2, targets.expand(len(hidden), 1, -1).mT, float("-inf")).amax(-1)
            return (found - others).amin(-1).tolist()
        likelihoods = found - logits.logsumexp(-1)[:, at]
        sums = found.new_zeros(len(hidden), len(self.question.choices))
        sums.index_add_(1, torch.tensor(packed.scored, device=device), likelihoods)
        return [margin(those, self.question) for those in sums.tolist()]
