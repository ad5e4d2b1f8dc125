"""Which drafted tokens stand, and when a row is done.

Greedy: a drafted token stands if it is the one the target would have chosen, so the result is the target's, token for
token. Sampling: a token x drawn from q stands with probability min(1, p(x) / q(x)); where one falls, its replacement is
drawn from max(p - q, 0), normalised, and the result has the target's distribution (arXiv 2211.17192, algorithm 1).
p and q are the distributions after all logits processors. A token that was copied, not drawn, has q(x) = 1. Where
several tokens were copied for one place, they are tried one after the other, each against what those before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from layerwise.decoding.choice import Endings, likeliest

# Those that look at the logits alone: a draft may use them at positions that come to nothing. Others count or remember,
# and see only what is verified; a draft without them is a little worse, and the output is right all the same.
_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
# Those that remember the text so far: of one row, which they see token by token, and of no more.
_REMEMBERING = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)

Chosen = tuple[int, int]  # the number of the drafted token that stands, or -1, and the token


@dataclass(slots=True)
class Pick:
    """A drafted token of each row.

    `tokens` (rows, 1); `sure` is the draft's own probability of each, `q` its distribution (rows, vocabulary), None
    when the choice is greedy.
    """

    tokens: Tensor
    sure: list[float]
    q: Tensor | None = None


class Judge:
    """Chooses as `generate` was told to: `processors`, `criteria` and `config` are what transformers prepared, `width`
    the columns of the prompt."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        vocabulary: int,
        trusting: bool = False,
        rows: int = 1,
        width: int = 0,
    ) -> None:
        if (rows > 1 or trusting) and any(isinstance(one, _REMEMBERING) for one in processors):
            raise ValueError(
                "guidance and SynthID watermarks follow one row token by token: use draft='off', or one row and a "
                "draft that is verified"
            )
        self.processors = processors
        self.trusting = trusting  # every drafted token stands: early exit without verification
        self.sampling = config.do_sample
        self.temperature = (config.temperature or 1.0) if config.do_sample else 0.0
        self.vocabulary = vocabulary
        self.warpers = LogitsProcessorList([one for one in processors if isinstance(one, _WARPERS)])
        self.rows, self.width = rows, width
        self.endings = Endings(criteria)
        keep = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep and config.output_logits else None
        if trusting and (self.scores is not None or self.logits is not None):
            raise ValueError("scores and logits are not kept of tokens that leave early: use a draft that is verified")
        self._texts: dict[int, tuple[Tensor, int]] = {}  # of trusted rows: what `judge` was given, how long it now is

    @property
    def plain(self) -> bool:
        """Whether a choice is the likeliest token and nothing more, so that all positions can be judged at once."""
        kept = self.scores is not None or self.logits is not None
        return not (self.sampling or self.processors or kept or self.trusting)

    # -- drafting ----------------------------------------------------------------------------------------

    def pick(self, logits: Tensor, vocabulary: Tensor | None, rows: Sequence[int], drafted: Sequence[Tensor]) -> Pick:
        """Draft a token of each row from logits (rows, tokens), those of the ids `vocabulary` if it is given.

        `rows` are their numbers in the batch, `drafted` the tokens (rows, 1) drafted before this one.
        """
        if self.trusting and self.processors:  # nobody will look at it again: it is chosen as the target's would be
            logits = torch.cat([self._after_drafted(logits, at, row, drafted) for at, row in enumerate(rows)])
        if not self.sampling:
            sure, tokens = torch.softmax(logits, -1).max(-1, keepdim=True)
            return Pick(tokens if vocabulary is None else vocabulary[tokens], sure[:, 0].tolist())
        if vocabulary is not None:
            whole = logits.new_full((logits.shape[0], self.vocabulary), -torch.inf)
            logits = whole.index_copy(1, vocabulary, logits)
        q = torch.softmax(logits if self.trusting else self.warpers(None, logits), -1)
        tokens = torch.multinomial(q, 1)
        return Pick(tokens, q.gather(1, tokens)[:, 0].tolist(), q)

    def _after_drafted(self, logits: Tensor, at: int, row: int, drafted: Sequence[Tensor]) -> Tensor:
        text, length = self._texts[row]
        text = torch.cat([text[:, :length], *(one[at : at + 1] for one in drafted)], 1)
        return self._processed(text, logits[at : at + 1], row)

    # -- verifying ---------------------------------------------------------------------------------------

    def judge(
        self,
        logits: Tensor,
        drafted: Sequence[int],
        parents: Sequence[int],
        q: Sequence[Tensor] | None,
        text: Tensor,
        length: int,
        row: int,
    ) -> tuple[list[int], int]:
        """The numbers of the drafted tokens of a row that stand, and the token that follows them.

        Args:
            logits: (drafted + 1, vocabulary), float32, of the target: after the text, and after each drafted token.
            parents: the number of the drafted token that each follows; -1 for the text.
            q: each drafted token's distribution (vocabulary,); None if they were not drawn.
            text: (1, room) the row's tokens as `generate` keeps them, of which `length` are there; what stands is
                written behind them.
            row: its number in the batch.
        """
        stand: list[int] = []
        while True:
            at = stand[-1] if stand else -1
            follow = [number for number, parent in enumerate(parents) if parent == at]
            if self.trusting and follow:
                chosen, token = follow[0], drafted[follow[0]]
            else:
                scores = self._scores(text[:, : length + len(stand)], logits[at + 1 : at + 2], row)[0]
                choose = self._sampled if self.sampling else _likeliest
                chosen, token = choose(scores, [(number, drafted[number]) for number in follow], q)
            if chosen < 0:
                if self.trusting:
                    self._texts[row] = (text, length + len(stand) + 1)
                return stand, token
            text[0, length + len(stand)] = token
            stand.append(chosen)

    def _sampled(self, scores: Tensor, guesses: Sequence[tuple[int, int]], q: Sequence[Tensor] | None) -> Chosen:
        p = torch.softmax(scores, -1)
        for number, token in guesses:
            drawn = None if q is None else q[number]
            if torch.rand(()) * (1.0 if drawn is None else float(drawn[token])) < float(p[token]):
                return number, token
            p = _rest(p, token, drawn)
        return -1, int(torch.multinomial(p, 1))

    def _scores(self, text: Tensor, logits: Tensor, row: int) -> Tensor:
        if self.logits is not None:
            self.logits += (logits.clone(),)
        scores = self._processed(text, logits, row)
        if self.scores is not None:
            self.scores += (scores,)
        return scores

    def _processed(self, text: Tensor, logits: Tensor, row: int) -> Tensor:
        if self.rows > 1 and len(self.processors) > len(self.warpers):  # some tell rows apart by their place
            every = (self.rows, -1)
            return self.processors(text.expand(every), logits.expand(every).clone())[row : row + 1]
        return self.processors(text, logits.clone()) if self.processors else logits

    def finished(self, token: int, text: Tensor, length: int, row: int) -> bool:
        """Whether `row` is done with `token`, the last of the `length` tokens in `text` (1, room)."""
        if self.endings.reached(token, length):
            return True
        if not self.endings.others:
            return False
        scores = None if self.scores is None else self.scores[: length - self.width]
        return self.endings.asked(text[:, :length].expand(self.rows, -1), scores)[row]


def _likeliest(scores: Tensor, guesses: Sequence[tuple[int, int]], q: Sequence[Tensor] | None) -> Chosen:
    best = int(likeliest(scores))
    return next((number for number, token in guesses if token == best), -1), best


def _rest(p: Tensor, token: int, q: Tensor | None) -> Tensor:
    """max(p - q, 0), normalised; q is all on `token` if it is None."""
    if q is None:
        rest = p.clone()
        rest[token] = 0.0
    else:
        rest = (p - q).clamp(min=0.0)
    # Rounding can leave nothing where p and q agree; then the refusal was rounding too.
    total = float(rest.sum())
    return rest / total if total > 0.0 else p
