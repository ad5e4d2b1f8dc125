"""A causal LM whose `forward` and `generate` walk plans.

`attach(model)` wraps a Hugging Face causal LM and leaves it as it was. The wrapper is itself a `PreTrainedModel`, so
Trainer, perplexity scripts, `generate` and evaluation harnesses use it without knowing, and what they measure is
the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerwise.decoding.autoregressive import decode
from layerwise.decoding.drafts import Draft
from layerwise.decoding.ngram_model import NGramModel
from layerwise.decoding.pass_times import BESIDES, pass_times
from layerwise.decoding.tuner import Tuner
from layerwise.model.backbone import Backbone, UnsupportedModelError
from layerwise.model.bridges import Bridges
from layerwise.model.cache import Cache
from layerwise.model.compiled import CompiledEngine, compiler_available
from layerwise.model.exit_head import ExitHead
from layerwise.model.fingerprint import digests, fingerprint, is_adapted
from layerwise.model.packing import Packing, check_positions, lengths_of_prompts
from layerwise.model.routed_layers import RoutedLayers
from layerwise.model.runtime import EagerEngine, Engine, Runtime, check_fit
from layerwise.model.thin import ThinMlps
from layerwise.model.thin_head import ThinHead
from layerwise.plan import Part, Plan, Route, Visit
from layerwise.policies import FixedPolicy, Policy, RoutingPolicy
from layerwise.trace import Phase, Trace

EngineName = Literal["auto", "eager", "compiled"]
_UNRECORDED = ("output_hidden_states", "output_attentions")


class LayerwiseForCausalLM(PreTrainedModel, GenerationMixin):
    """`base` (a causal LM, with or without PEFT adapters) run by plans that `policy` decides."""

    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(self, base: nn.Module, policy: Policy | None = None, engine: Engine | None = None) -> None:
        inner = base
        if is_adapted(base) and hasattr(base, "get_base_model"):
            if any(config.is_prompt_learning for config in base.peft_config.values()):
                raise UnsupportedModelError(
                    "PEFT prompt learning does not fit: use adapters in the layers, such as LoRA"
                )
            inner = base.get_base_model()
        backbone = Backbone(inner)
        try:
            super().__init__(inner.config)
        except ValueError as error:  # the configuration asks for what transformers allows its own classes only
            raise UnsupportedModelError(f"{backbone.name} does not fit: {error}") from error
        self.base = base
        self.generation_config = inner.generation_config
        self.all_tied_weights_keys = {
            f"base.{alias}": f"base.{name}" for alias, name in getattr(base, "all_tied_weights_keys", {}).items()
        }
        self.runtime = Runtime(backbone, engine)
        self.policy = policy or FixedPolicy(Plan.full(self.runtime.backbone.depth))
        self.training = base.training
        self.attached_to, self.attached_digests = fingerprint(inner), digests(inner)  # tell at save what has changed
        self.exit_head: ExitHead | None = None  # drafts for this model, if it was trained
        self.ngrams: NGramModel | None = None  # of its answers, to draft with
        self.routed_layers: RoutedLayers | None = None  # layers whose attention is routed
        self.bridges: Bridges | None = None  # what stands in for layers, where a plan says so
        self.thin: ThinMlps | None = None  # and for their MLPs
        self.thin_head: ThinHead | None = None  # and for the LM head
        self.exits: tuple[int, ...] = ()  # exits that were trained: drafts that `auto` tries
        self._draft = Draft("off")
        self._tuners: dict[str, Tuner] = {}
        self._pass_times: dict[str, dict[int, float]] = {}
        self._head_runtime: Runtime | None = None
        self._cut_runtime: Runtime | None = None
        self.adapter_folder: Path | None = None  # what it was loaded from
        self.merged = False  # set when an adapter's weights were merged into the base

    # -- plans -------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return self.runtime.backbone.depth

    @property
    def plan(self) -> Plan | None:
        """The plan every row takes, or None if the policy decides per prompt. Assign a Plan or its text."""
        return self.policy.plan if isinstance(self.policy, FixedPolicy) else None

    @plan.setter
    def plan(self, plan: Plan | str) -> None:
        self.policy = FixedPolicy(self.read_plan(plan))

    def read_plan(self, plan: Plan | str) -> Plan:
        """Check a plan, or parse its text, for this model; ValueError if it does not fit."""
        if isinstance(plan, str):
            plan = Plan.parse(plan, self.depth)
        if not isinstance(plan, Plan):
            raise ValueError(f"a plan is a Plan or its text, not {plan!r}")
        return self.runtime.backbone.check(plan)

    def row_plans(self, rows: int, plans: Sequence[Plan | str] | None = None) -> list[Plan]:
        """The plan of each row: `plans` if given (one a row), else what the policy says."""
        if plans is None:
            return list(self.policy.plans(rows))
        if isinstance(plans, (str, Plan)) or len(plans) != rows:
            raise ValueError(f"plans must be a list with one plan a row: {rows} rows")
        return [self.read_plan(plan) for plan in plans]

    def decide(
        self, lengths: Sequence[int], plans: Sequence[Plan | str] | None = None, cache: Cache | None = None
    ) -> list[Plan] | Route:
        """What a pass over rows with prompts of `lengths` tokens walks: `plans` if given, else what the policy says.

        A routing policy decides in the pass that reads the prompt; what continues its cache keeps the decision.
        """
        if plans is None and isinstance(self.policy, RoutingPolicy):
            kept = cache is not None and cache.plans is not None and any(cache.lengths)
            return list(cache.plans) if kept else self.policy.route(lengths)
        return self.row_plans(len(lengths), plans)

    # -- drafts ------------------------------------------------------------------------------------------

    @property
    def draft(self) -> Draft:
        """How `generate` drafts unless told otherwise; off at first. Assign a Draft or its text, such as "auto"."""
        return self._draft

    @draft.setter
    def draft(self, draft: Draft | str) -> None:
        self._draft = self.read_draft(draft)

    def read_draft(self, draft: Draft | str | None) -> Draft:
        """Check a draft, or parse its text, for this model; the model's own if None; ValueError if it does not fit."""
        if draft is None:
            return self._draft
        if isinstance(draft, str):
            draft = Draft.parse(draft, self.depth)
        if not isinstance(draft, Draft):
            raise ValueError(f"a draft is a Draft or its text, not {draft!r}")
        if draft.kind == "head" and self.exit_head is None:
            raise ValueError("this model has no exit head to draft with: load an adapter that brings one, or use auto")
        if draft.kind == "corpus" and self.ngrams is None:
            raise ValueError("this model has no corpus to draft from: load an adapter that brings one, or use auto")
        if draft.plan is not None:
            self.runtime.backbone.check(draft.plan)
        as_text = replace(draft, trust=None)
        return replace(Draft.parse(str(as_text), self.depth), trust=draft.trust)

    def cross_by(self, bridges: Bridges) -> None:
        """Have these where a plan names them (`4b`), in place of any that were there."""
        self.bridges = bridges
        bridges.attach(self.runtime.backbone)

    def thin_by(self, thin: ThinMlps | None) -> None:
        """Have these where a plan names them (`4t`), in place of any that were there; or none."""
        self.thin = thin
        self.runtime.backbone.thin = {} if thin is None else {layer: thin[layer] for layer in thin.numbers}

    def thin_head_by(self, head: ThinHead | None) -> None:
        """Have this where a plan names it (`ht`), in place of any that was there; or none."""
        self.thin_head = self.runtime.backbone.thin_head = head

    def tuner(self, draft: Draft, rows: int, temperature: float = 0.0, depth: int | None = None) -> Tuner:
        """What was measured of `draft` for batches of so many rows at a temperature; kept from answer to answer.

        Args:
            depth: layers of the plan that is drafted for, by which passes are the shorter; all of them if not given.
        """
        depth = self.depth if depth is None else depth
        name = f"{draft} {rows} {temperature:g} {depth}"
        if name not in self._tuners:
            # A draft of a fixed length has nothing to choose.
            times = self.pass_times(rows) if draft.length is None else {}
            share = (depth + BESIDES) / (self.depth + BESIDES)
            self._tuners[name] = Tuner.timed({width: share * seconds for width, seconds in times.items()})
        return self._tuners[name]

    def pass_times(self, rows: int) -> dict[int, float]:
        """Seconds of a pass over so many tokens of each of `rows` rows; measured once, see `decoding.pass_times`."""
        name = f"{rows} {self.runtime.engine.name} {self.dtype} {self.device}"
        if name not in self._pass_times:
            self._pass_times[name] = pass_times(self.runtime, rows)
        return self._pass_times[name]

    @property
    def head_runtime(self) -> Runtime | None:
        """The exit head, run as a model of one layer by the same engine; None if there is no head."""
        if self.exit_head is None:
            return None
        if not self._serves(self._head_runtime):
            own = self.exit_head.backbone(self.runtime.backbone)
            self._head_runtime = Runtime(own, self._engine_for(own))
        return self._head_runtime

    def _serves(self, runtime: Runtime | None) -> bool:
        """Whether `runtime` was made for the exit head that is there now, and for the engine."""
        return (
            runtime is not None
            and runtime.backbone.head is self.exit_head.head
            and runtime.engine.name == self.runtime.engine.name
        )

    def draft_logits(self) -> tuple[Callable[[Tensor, Sequence[Plan]], Tensor], Tensor | None]:
        """The logits that plans draft with, and of which tokens: those of the exit head's vocabulary, if there is one.
        That is shorter than any other head."""
        if self.exit_head is None:
            return self.runtime.logits, None
        if not self._serves(self._cut_runtime):
            cut = self.runtime.backbone.over(head=self.exit_head.head)
            self._cut_runtime = Runtime(cut, self._engine_for(cut))
            self._cut_runtime.engine.prepare([], few=True)
        cut_engine = self._cut_runtime.engine
        return lambda hidden, _: cut_engine.logits(hidden), self.exit_head.vocabulary

    def prepare(self, plans: Sequence[Plan | str] | None = None, draft: Draft | None = None, few: bool = False) -> None:
        """Compile, or find, what decoding with `plans` and `draft` needs, so that nobody waits for it later.

        Without `plans`: the policy's, which may be any part of the whole model if it decides at the prompt.
        """
        whole = plans is None and (isinstance(self.policy, RoutingPolicy) or (draft and draft.kind == "policy"))
        backbone = self.runtime.backbone
        # What a policy that decides at the prompt may choose from.
        routes = [Plan.full(self.depth)]
        others = [*backbone.bridges, *(Visit(layer, Part.THIN) for layer in backbone.thin)]
        if others or backbone.thin_head is not None:
            routes.append(Plan(tuple(others) or routes[0].visits, backbone.thin_head is not None))
        everything = list(routes) if whole else self.row_plans(1 if plans is None else len(plans), plans)
        if draft is not None and draft.kind == "policy":
            everything += routes if isinstance(self.policy, RoutingPolicy) else self.policy.plans(1)
        everything += [draft.plan] if draft is not None and draft.plan is not None else []
        self.runtime.engine.prepare(everything, few)
        if self.exit_head is not None and self._serves(self._cut_runtime):
            self._cut_runtime.engine.prepare([], few=True)
        if draft is not None and draft.kind in ("auto", "head") and self.head_runtime is not None:
            self.head_runtime.engine.prepare([Plan.full(1)], few=True)
        if self.ngrams is not None and draft is not None and draft.kind in ("auto", "corpus", "tree"):
            self.ngrams.prepare()

    def _engine_for(self, backbone: Backbone) -> Engine:
        engine = self.runtime.engine
        return CompiledEngine(backbone, engine.notify) if isinstance(engine, CompiledEngine) else EagerEngine(backbone)

    # -- what Hugging Face asks of a model ---------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings (rows, width, hidden size) of token ids (rows, width)."""
        return self.runtime.backbone.embedding(input_ids.to(self.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        plans: Sequence[Plan | str] | None = None,
        trace: Trace | None = None,
        prompt_lengths: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass that honours the plan.

        Args:
            input_ids: (rows, width) token ids; or `inputs_embeds` (rows, width, hidden size).
            attention_mask: (rows, width) ones for tokens and zeros for padding, on either side.
            position_ids: only as a check; a token's position is its number among the row's tokens.
            past_key_values: a `layerwise.Cache`, continued in place. With `use_cache=True` a new one is made.
            labels: (rows, width), -100 where no loss is wanted; shifted inside, as in transformers.
            logits_to_keep: compute logits for the last so many columns only (0: all), or for the columns named.
            plans: one plan a row, instead of the policy's.
            trace: gets what ran.
            prompt_lengths: tokens of each row, padding not counted, that a routing policy may look at. If not given,
                those before the first label; without labels, all: then the gates see what a harness scores.

        Returns:
            loss (if labels), logits (rows, kept, vocabulary), past_key_values (if cached).

        Raises:
            ValueError: inputs that contradict each other, or a request this model cannot honour.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise ValueError(f"past_key_values must be a layerwise.Cache, not {type(past_key_values).__name__}")
        for unsupported in _UNRECORDED:
            if kwargs.pop(unsupported, None):
                raise ValueError(f"{unsupported} is not recorded; call the base model for it")
        kwargs.pop("return_dict", None)
        if use_cache and past_key_values is None:
            past_key_values = Cache((inputs_embeds if input_ids is None else input_ids).shape[0], 256)
        if past_key_values is not None and torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients: call under torch.no_grad(), or without use_cache")
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        rows, width, _ = hidden.shape
        if past_key_values is not None:
            past_key_values.check_rows(rows)
        if past_key_values is not None and not any(past_key_values.lengths):
            self.runtime.engine.refresh()
        packing = Packing.of(rows, width, attention_mask)
        if position_ids is not None:
            check_positions(position_ids, packing)
        lengths = packing.counts
        if plans is None and isinstance(self.policy, RoutingPolicy):
            lengths = lengths_of_prompts(packing, labels, prompt_lengths)
        walked = self.decide(lengths, plans, past_key_values)
        hidden = self.runtime.forward(
            packing.pack(hidden), walked, packing.counts, past_key_values, trace, Phase.PREFILL
        )
        hidden = packing.unpack(hidden)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        plans = walked if isinstance(walked, Sequence) else walked.plans
        logits = Runtime(self.runtime.backbone).logits(hidden[:, keep], plans)
        loss = None
        if labels is not None:
            loss = self.runtime.backbone.model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, walking plans; also takes `plans` (one a row), `trace` and `draft`.

        With a `draft` (see `decoding.drafts`: "auto", "ngram", "exit:8", "plan:0-5 20-29", ...) tokens are proposed
        cheaply and verified by the plan; the output is the same, or has the same distribution when sampling. With
        `num_return_sequences`, `plans` are one a row or one an answer. `use_cache` changes nothing: a layerwise
        cache is always used, a new one unless `past_key_values` is given. Inputs are moved to the model's device.

        Raises:
            ValueError: something is asked for that this model cannot honour, such as beam search or an assistant
                model, or the prompt is longer than the context.
        """
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def asked(name: str) -> Any:
            given = kwargs.get(name)
            given = getattr(config, name, None) if given is None else given
            return getattr(self.generation_config, name, None) if given is None else given

        assisted = asked("prompt_lookup_num_tokens") or asked("assistant_early_exit") or kwargs.get("assistant_model")
        if (asked("num_beams") or 1) > 1 or assisted:
            raise ValueError("layerwise decodes greedily or by sampling: set num_beams=1 and give no assistant_model")
        if asked("cache_implementation"):
            raise ValueError("layerwise brings its own cache: leave cache_implementation out")
        if asked("prefill_chunk_size"):
            raise ValueError("layerwise reads a prompt in one pass: leave prefill_chunk_size out")
        for unsupported in _UNRECORDED:
            if asked(unsupported):
                raise ValueError(f"{unsupported} is not recorded; call the base model for it")
        if kwargs.get("prompt_lengths") is not None:
            raise ValueError("what generate is given is the prompt: leave prompt_lengths out")
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"past_key_values must be a layerwise.Cache, not {type(cache).__name__}")
        args = tuple(self._here(one) for one in args)
        return super().generate(*args, **{name: self._here(one) for name, one in kwargs.items()})

    def _here(self, value: Any) -> Any:
        """`value`, on the model's device if it is a tensor."""
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
        """`num_return_sequences`: one plan a row is repeated as the rows are; one an answer is as it should be."""
        plans = inputs.get("plans")
        if isinstance(plans, (list, tuple)) and len(plans) == len(inputs["input_ids"]):
            inputs["plans"] = [plan for plan in plans for _ in range(expand_size)]
        return super()._expand_inputs_for_generation(expand_size, **inputs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name != "draft"})

    def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What `generate` calls once everything is prepared, greedy decoding included.

        `generate(custom_generate=decode)` would be the public way in, but transformers then drops the streamer and
        the tokenizer that stop strings need (5.23).
        """
        return decode(self, input_ids, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.runtime.backbone.model.get_decoder()

    def save_pretrained(
        self, save_directory: str, is_main_process: bool = True, push_to_hub: bool = False, **_: Any
    ) -> None:
        """Save as an adapter: plan or policy, PEFT weights if any, and the base model's fingerprint.

        Processes other than the main one write nothing.

        Raises:
            ValueError: uploading is asked for, which the method `push_to_hub` does; or the model cannot be saved.
        """
        from layerwise.hub import save_adapter

        if push_to_hub:
            raise ValueError("save_pretrained only saves: call the model's push_to_hub to upload it")
        if is_main_process:
            save_adapter(self, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes; returns the address of the commit."""
        from layerwise.hub import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        return False  # `decode` makes a cache of slots


def attach(
    model: nn.Module,
    plan: Plan | str | None = None,
    engine: EngineName = "eager",
    notify: Callable[[str], None] | None = None,
) -> LayerwiseForCausalLM:
    """Make a causal LM walk plans; `model` itself is left as it was and shares its weights.

    Args:
        model: any Hugging Face causal LM that is embedding, decoder layers, norm and head; PEFT models too.
        plan: a Plan or its text, such as "0-5 8-29"; the full plan if None.
        engine: "eager" calls the modules as they are, "compiled" runs single tokens through fused kernels
            (compiled at the first one), "auto" is compiled where a C++ compiler and a CPU are there.
        notify: gets a line whenever a kernel has to be compiled.

    Raises:
        UnsupportedModelError: the model does not fit; says what is missing.
        ValueError: the plan does not fit the model, or there is no such engine.
    """
    if engine not in ("auto", "eager", "compiled"):
        raise ValueError(f"no engine '{engine}': choose auto, eager or compiled")
    attached = LayerwiseForCausalLM(model)
    backbone = attached.runtime.backbone
    if engine == "compiled" and backbone.device.type != "cpu":
        raise ValueError(f"compiled kernels are for the CPU, and the model is on {backbone.device}: use auto or eager")
    check_fit(backbone)
    if plan is not None:
        attached.plan = plan
    if engine == "compiled" and not compiler_available():
        raise ValueError("the compiled engine needs a C++ compiler (g++ or clang++): install one, or use eager")
    if engine == "compiled" or (engine == "auto" and compiler_available() and backbone.device.type == "cpu"):
        attached.runtime.engine = CompiledEngine(backbone, *([notify] if notify else []))
    else:
        attached.runtime.engine = EagerEngine(backbone)
    return attached
