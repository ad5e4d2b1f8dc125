"""Decoding one token after another, for transformers' `generate`.

transformers prepares everything that its users know (generation config, logits processors, stopping criteria,
streamers) and hands it to a decoding function; this is that function. Rows of a batch keep their own plans and
lengths, and a row that has finished is not run any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerwise.model.cache import Cache
from layerwise.model.packing import Packing
from layerwise.plan import Plan
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
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
    plans: Sequence[Plan | str] | None = None,
    trace: Trace | None = None,
    **_: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate from a prompt (rows, width); the contract is that of transformers' `_sample`.

    Raises:
        ValueError: the prompt is longer than the context that the model was made for.
    """
    runtime = model.runtime
    rows = input_ids.shape[0]
    row_plans = model.row_plans(rows, plans)
    if rows == 1:
        runtime.engine.prepare(row_plans)
    sequence = _Sequence(input_ids, generation_config)
    chooser = _Chooser(logits_processor, stopping_criteria, generation_config, rows)

    cached = past_key_values.get_seq_length() if past_key_values is not None else 0
    prompt = model.embed(input_ids[:, cached:]) if inputs_embeds is None else inputs_embeds
    context = getattr(model.runtime.backbone.config, "max_position_embeddings", None)
    if context is not None and cached + prompt.shape[1] > context:
        raise ValueError(
            f"the prompt has {cached + prompt.shape[1]} tokens, but the model's context ends at {context}: shorten it"
        )
    packing = Packing.of(rows, prompt.shape[1], attention_mask)
    cache = Cache(rows, cached + prompt.shape[1] + sequence.room) if past_key_values is None else past_key_values
    hidden = runtime.forward(packing.pack(prompt), row_plans, packing.counts, cache, trace, Phase.PREFILL)
    hidden = packing.last(hidden)
    while True:
        tokens = chooser.choose(sequence.so_far, runtime.engine.logits(hidden)[:, -1].float())
        sequence.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        active = chooser.still_running(sequence.so_far)
        if not any(active):
            break
        hidden = runtime.forward(model.embed(tokens[:, None]), row_plans, active, cache, trace, Phase.DECODE)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequence.so_far
    return GenerateDecoderOnlyOutput(
        sequences=sequence.so_far, scores=chooser.scores, logits=chooser.logits, past_key_values=cache
    )


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
        self.processors, self.criteria = processors, criteria
        self.sampling = config.do_sample
        self.pad = config._pad_token_tensor
        keep = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keep and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep and config.output_logits else None
        self.unfinished: Tensor | None = None
        self.rows = rows

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
            tokens = scores.argmax(dim=-1)
        if self.rows > 1 and self.unfinished is not None and self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, self.pad.to(tokens.device))
        return tokens

    def still_running(self, sequence: Tensor) -> list[int]:
        """1 for each row that goes on, 0 for each that is done."""
        going = ~self.criteria(sequence, None)
        self.unfinished = going if self.unfinished is None else self.unfinished & going
        return self.unfinished.int().tolist()
