"""Decoding one token after another, for transformers' `generate`.

transformers prepares everything that its users know (generation config, logits processors, stopping criteria,
streamers) and hands it to a decoding function; this is that function. Rows of a batch keep their own plans and
lengths, and a row that has finished is not run any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerwise.decoding.choice import Endings, likeliest
from layerwise.decoding.drafts import Draft
from layerwise.decoding.judge import Judge
from layerwise.decoding.speculative import speculate
from layerwise.model.cache import Cache
from layerwise.model.packing import Packing, check_positions, last_of
from layerwise.plan import Plan
from layerwise.policies import RoutingPolicy
from layerwise.trace import Phase, Trace

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM


def decode(
    model: LayerwiseForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
    plans: Sequence[Plan | str] | None = None,
    trace: Trace | None = None,
    draft: Draft | str | None = None,
    synced_gpus: bool = False,
    **_: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate from a prompt (rows, width); the contract is that of transformers' `_sample`.

    Raises:
        ValueError: the prompt is longer than the context that the model was made for, there is no such draft,
            processes are to decode in step, or a draft cannot give what is wanted of a batch.
    """
    if synced_gpus:
        raise ValueError("processes that share a model's weights cannot decode in step: leave synced_gpus out")
    runtime = model.runtime
    rows = input_ids.shape[0]
    plans = None if plans is None else model.row_plans(rows, plans)
    chosen_draft = model.read_draft(draft)
    speculative = chosen_draft.kind != "off"
    # What the prompt will decide is made ready as it is used, for a look through all that it may be takes milliseconds;
    # but in advance where rounds of drafts will be timed.
    as_used = plans is None and isinstance(model.policy, RoutingPolicy) and not speculative
    model.prepare([] if as_used else plans, chosen_draft, few=speculative or rows > 1)
    sequence = _Sequence(input_ids, generation_config)
    chooser = _Chooser(logits_processor, stopping_criteria, generation_config, rows)

    # transformers drops a mask of ones, and keeps its width.
    masked = getattr(generation_config, "_mask_length", None) if attention_mask is None else attention_mask.shape[1]
    only_new = masked is not None and masked > input_ids.shape[1]
    prompt = _Prompt.of(model, input_ids, attention_mask, inputs_embeds, past_key_values, only_new)
    if past_key_values is None and position_ids is not None:
        check_positions(position_ids, prompt.packing)
    cache = Cache(rows, max(prompt.counts) + sequence.room) if past_key_values is None else past_key_values
    if chosen_draft.kind == "policy" and plans is None:  # the policy drafts: what it drafts for is the whole model
        plans = [Plan.full(model.depth)] * rows
    walked = model.decide(prompt.counts, plans, cache)
    if speculative:
        vocabulary, trusting = len(runtime.backbone.head.weight), chosen_draft.trust is not None
        judge = Judge(
            logits_processor, stopping_criteria, generation_config, vocabulary, trusting, rows, input_ids.shape[1]
        )
        if rows > 1 and (judge.scores is not None or judge.logits is not None):
            raise ValueError("scores and logits of a batch are not kept while drafting: use draft='off', or one row")
        if rows > 1 and streamer is not None:  # rows get different numbers of tokens in a round
            raise ValueError("a streamer follows one row while drafting: use draft='off', or one row")
        read = (prompt.tokens, prompt.embedded, prompt.counts)
        padding = chooser.pad.to(input_ids.device) if chooser.padding else None
        keep = past_key_values is not None or bool(generation_config.return_dict_in_generate)
        whole = speculate(model, input_ids, read, walked, cache, chosen_draft, judge, padding, streamer, trace, keep)
        if not generation_config.return_dict_in_generate:
            return whole
        made = whole.shape[1] - input_ids.shape[1]  # what was drafted beyond an end token was judged too
        scores, logits = (None if kept is None else kept[:made] for kept in (judge.scores, judge.logits))
        return GenerateDecoderOnlyOutput(sequences=whole, scores=scores, logits=logits, past_key_values=cache)
    hidden = runtime.forward(prompt.embedded, walked, prompt.counts, cache, trace, Phase.PREFILL)
    row_plans = walked if isinstance(walked, Sequence) else walked.plans  # decided once, kept for the answer
    if trace is not None:
        trace.targets = list(row_plans)
    hidden = last_of(hidden, prompt.counts)
    best: int | None = None
    while True:
        if best is None:
            tokens = chooser.choose(sequence.so_far, runtime.logits(hidden, row_plans)[:, -1].float())
        else:
            tokens = input_ids.new_tensor([best])
        sequence.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        active = chooser.still_running(sequence.so_far)
        if not any(active):
            break
        best = runtime.greedy(int(tokens), row_plans[0], cache, trace) if chooser.plain else None
        if best is None:
            hidden = runtime.forward(model.embed(tokens[:, None]), row_plans, active, cache, trace, Phase.DECODE)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequence.so_far.contiguous()
    return GenerateDecoderOnlyOutput(
        sequences=sequence.so_far.contiguous(), scores=chooser.scores, logits=chooser.logits, past_key_values=cache
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What has to be read before the first token: embeddings packed to the left, and how many each row has."""

    tokens: Tensor  # (rows, width), packed to the left; (rows, 0) if embeddings were given
    embedded: Tensor
    counts: list[int]
    packing: Packing

    @classmethod
    def of(
        cls,
        model: LayerwiseForCausalLM,
        input_ids: Tensor,
        mask: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: Cache | None,
        only_new: bool,
    ) -> _Prompt:
        """As in transformers, `input_ids` with a cache hold the cached tokens too, unless the mask is wider."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        rows, width = given.shape[:2]
        packing = Packing.of(rows, width, mask)
        packed, counts = packing.pack(given), packing.counts
        lengths = [0] * rows if cache is None else cache.lengths
        if cache is not None:
            if inputs_embeds is not None:
                raise ValueError("a cache is continued with input_ids: leave inputs_embeds out")
            cache.check_rows(rows)
            if not only_new:
                packed, counts = _after(packed, counts, lengths)
        context = model.runtime.backbone.context
        longest = max(length + count for length, count in zip(lengths, counts, strict=True))
        if context is not None and longest > context:
            raise ValueError(f"the prompt has {longest} tokens, but the model's context ends at {context}: shorten it")
        if inputs_embeds is not None:
            return cls(input_ids.new_zeros(rows, 0), packed, counts, packing)
        return cls(packed, model.embed(packed), counts, packing)


def _after(packed: Tensor, counts: list[int], lengths: list[int]) -> tuple[Tensor, list[int]]:
    """The tokens of each row that its cache does not hold yet, packed to the left."""
    fresh = [count - length for count, length in zip(counts, lengths, strict=True)]
    if min(fresh) < 1:
        row = fresh.index(min(fresh))
        raise ValueError(f"row {row} has {counts[row]} tokens and its cache {lengths[row]}: nothing is left to read")
    columns = torch.arange(max(fresh), device=packed.device) + torch.tensor(lengths, device=packed.device)[:, None]
    return packed.gather(1, columns.clamp(max=packed.shape[1] - 1)), fresh


class _Sequence:
    """The growing (rows, columns) of token ids, in a buffer of the final size."""

    def __init__(self, input_ids: Tensor, config: GenerationConfig) -> None:
        rows, self.width = input_ids.shape
        self.room = max(1, config.max_length - self.width)
        self.buffer = input_ids.new_zeros(rows, self.width + self.room)
        self.buffer[:, : self.width] = input_ids

    @property
    def so_far(self) -> Tensor:
        return self.buffer[:, : self.width]

    def append(self, tokens: Tensor) -> None:
        if self.width == self.buffer.shape[1]:  # stopping criteria of the user's own may ignore max_length
            self.buffer = torch.cat([self.buffer, torch.zeros_like(self.buffer)], dim=1)
        self.buffer[:, self.width] = tokens
        self.width += 1


class _Chooser:
    """Turns logits into tokens, and tells which rows go on."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        rows: int,
    ) -> None:
        self.processors, self.endings = processors, Endings(criteria)
        self.sampling = config.do_sample
        self.pad = config._pad_token_tensor
        keep = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep and config.output_logits else None
        self.running = [True] * rows
        # As in transformers: without an end token nobody pads, and finished rows go on until all are done.
        self.padding = rows > 1 and self.pad is not None and any(hasattr(c, "eos_token_id") for c in criteria)

    @property
    def plain(self) -> bool:
        """Whether the choice for the only row is its likeliest token, and nobody asks for the logits."""
        kept = self.scores is not None or self.logits is not None
        return len(self.running) == 1 and not (self.sampling or self.processors or kept)

    def choose(self, sequence: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row, (rows,); finished rows get padding."""
        if self.logits is not None:
            self.logits += (logits.clone(),)
        scores = self.processors(sequence, logits) if self.processors else logits
        if self.scores is not None:
            self.scores += (scores,)
        if self.sampling:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = likeliest(scores)
        if self.padding and not all(self.running):
            tokens = torch.where(torch.tensor(self.running, device=tokens.device), tokens, self.pad.to(tokens.device))
        return tokens

    def still_running(self, sequence: Tensor) -> list[int]:
        """1 for each row that goes on, 0 for each that is done with its last token."""
        length = sequence.shape[1]
        done = [self.endings.reached(token, length) for token in sequence[:, -1].tolist()]
        if self.endings.others:
            asked = self.endings.asked(sequence, self.scores)
            done = [known or other for known, other in zip(done, asked, strict=True)]
        self.running = [before and not now for before, now in zip(self.running, done, strict=True)]
        return [int(one if self.padding else any(self.running)) for one in self.running]
