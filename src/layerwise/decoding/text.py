"""From a prompt to text, with what it took.

Three layers: `decode` turns token ids into token ids; `Detokenizer` turns ids into text as they come; `answer` takes
a string and gives a string, the plan of each token, and the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.decoding.drafts import Draft
from layerwise.plan import Plan
from layerwise.trace import Phase, Source, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerwise.model.causal_lm import LayerwiseForCausalLM


LEAST_TEMPERATURE = 1e-6  # as good as greedy; of much less the scores are no finite numbers


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else by sampling with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not self.temperature >= LEAST_TEMPERATURE:
            raise ValueError(f"temperature is 0 (greedy) or at least {LEAST_TEMPERATURE:g}, not {self.temperature}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"a seed is a number of 64 bits, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, not {self.top_p}")

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text; `pieces[i]`, `plans[i]` and `sources[i]` belong to token i.

    `plans[i]` is the plan whose output token i is; the first token never leaves early, so `plans[0]` is the whole plan.
    `layers_run` also counts what was drafted, what was verified in vain, and what ran of a token after its exit, for
    the cache. `acceptance` is the share of drafted tokens that stood, None if nothing was drafted.
    `prefill_seconds` is the time to the first token, `decode_seconds` the time from there to the last.
    """

    pieces: tuple[str, ...]
    plans: tuple[Plan, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    stop_reason: str  # "end of answer", "max new tokens" or "end of context"
    sources: tuple[Source, ...] = ()
    layers_run: float | None = None  # over all tokens
    acceptance: float | None = None
    draft: str = "off"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def tokens(self) -> int:
        return len(self.pieces)

    @property
    def exited(self) -> int:
        """Tokens that left early."""
        return sum(plan != self.plans[0] for plan in self.plans)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the time to the first token is reading the prompt and does not count."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else 0.0

    @property
    def layers_per_token(self) -> float:
        """Mean layers run for each token generated."""
        run = sum(plan.depth for plan in self.plans) if self.layers_run is None else self.layers_run
        return run / len(self.plans)

    def summary(self) -> str:
        """One line for people."""
        drafted = f"{self.exited} of them by {min(map(len, self.plans))} layers, " if self.exited else ""
        if self.acceptance is not None:
            drafted = f"{self.sources.count(Source.DRAFTED)} of them drafted ({self.acceptance:.0%} accepted), "
        return (
            f"{self.tokens} tokens, {drafted}{self.tokens_per_second:.1f} tokens/s, "
            f"{self.layers_per_token:.1f} layers per token, stopped at {self.stop_reason}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "layers_per_token": round(self.layers_per_token, 3),
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "stop_reason": self.stop_reason,
            "plan": str(self.plans[0]),
            "draft": self.draft,
            "drafted_tokens": self.sources.count(Source.DRAFTED),
            "exited_tokens": self.exited,
            "acceptance": None if self.acceptance is None else round(self.acceptance, 4),
        }


MOST_HELD = 6  # a character has at most four bytes, so what is not whole by then is really broken


class Detokenizer:
    """Token ids to text, one piece a token; a token that ends inside a character gives "" until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # what lies before is printed and no longer decoded again
        self.shown = ""
        self.held = 0  # tokens waiting for the rest of a character

    def piece(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        if text.endswith("�") and self.held < MOST_HELD:
            self.held += 1
            return ""
        self.held = 0
        piece = text[len(self.shown) :]
        if piece.endswith("\n") or (len(self.ids) - self.start > 64 and not text.endswith("�")):
            # One token of context stays: some tokenizers drop the space before the first word.
            self.start = len(self.ids) - 1
            text = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        self.shown = text
        return piece

    def rest(self) -> str:
        """What is still held: text that ends inside a character, because there was room for no more."""
        if not self.held:
            return ""
        return self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)[len(self.shown) :]


class _Watch:
    """A streamer that notes times and passes text on."""

    def __init__(self, detokenizer: Detokenizer, on_text: Callable[[str], None]) -> None:
        self.detokenizer, self.on_text = detokenizer, on_text
        self.pieces: list[str] = []
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, tokens: Tensor) -> None:
        if not self.prompt_seen:  # transformers streams the prompt first
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.pieces.append(self.detokenizer.piece(int(tokens.reshape(-1)[0])))
        self.on_text(self.pieces[-1])

    def end(self) -> None:
        rest = self.detokenizer.rest()
        if rest:
            self.pieces[-1] += rest
            self.on_text(rest)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, context: int | None = None
) -> dict[str, Tensor]:
    """Token ids (1, width) and mask of a prompt, in the model's chat format if it has one.

    Raises:
        ValueError: the prompt is empty, longer than `context` tokens, or refused by the chat template.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text in quotes")
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:  # such as a template that knows no system message
            raise ValueError(f"the model's chat template refuses this prompt: {error}") from error
    else:
        encoded = tokenizer(f"{system}\n\n{prompt}" if system else prompt, return_tensors="pt")
    width = encoded["input_ids"].shape[1]
    if context is not None and width >= context:
        raise ValueError(f"the prompt has {width} tokens, but the model's context ends at {context}: shorten it")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def end_tokens(model: LayerwiseForCausalLM) -> list[int]:
    """The tokens that end an answer of `model`."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def answer(
    model: LayerwiseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] = lambda piece: None,
    draft: Draft | str | None = None,
) -> Answer:
    """Answer one prompt; `on_text` gets the text as it is made. `draft` is who drafts, the model's choice if None.

    Raises:
        ValueError: the prompt is empty or too long, there is nothing to generate, or no such draft.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, not {max_new_tokens}")
    sampling = sampling or Sampling()
    context = model.runtime.backbone.context
    inputs = encode(tokenizer, prompt, system, context)
    width = inputs["input_ids"].shape[1]
    room = max_new_tokens if context is None else min(max_new_tokens, context - width)
    watch, trace = _Watch(Detokenizer(tokenizer), on_text), Trace()
    draft = model.read_draft(draft)
    model.prepare(None, draft, few=draft.kind != "off")  # compiling is neither reading nor decoding
    if draft.kind != "off" and draft.length is None:
        model.pass_times(1)  # nor is timing passes
    torch.manual_seed(sampling.seed)
    began = time.perf_counter()
    output = model.generate(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        max_new_tokens=room,
        streamer=watch,
        trace=trace,
        draft=draft,
        **sampling.options(),
    )
    ended = output[0, -1].item() in end_tokens(model)
    limit = "max new tokens" if room == max_new_tokens else "end of context"
    # The first token comes out of the pass over the prompt, the later ones out of passes of their own.
    (plan,) = trace.targets
    sources = trace.sources[0] if trace.sources else [Source.DECODED] * len(watch.pieces)
    plans = [plan] * len(watch.pieces)
    if draft.trust is not None:  # what was drafted is an early exit, and nothing was verified
        plans = [plan[: draft.exit] if source is Source.DRAFTED else plan for source in sources]
        sources = [Source.DECODED] * len(sources)
    spent = (Phase.DECODE, Phase.DRAFT, Phase.VERIFY)
    return Answer(
        pieces=tuple(watch.pieces),
        plans=tuple(plans),
        prompt_tokens=width,
        prefill_seconds=watch.times[0] - began,
        decode_seconds=watch.times[-1] - watch.times[0],
        stop_reason="end of answer" if ended else limit,
        sources=tuple(sources),
        layers_run=plan.depth + trace.layers_per_token(*spent) * trace.tokens(*spent),
        acceptance=trace.acceptance if trace.drafted and draft.trust is None else None,
        draft=str(draft),
    )
