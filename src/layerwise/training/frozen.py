"""The frozen recipe: teach an exit head to draft for a model that is left as it is.

Four things decide how often a draft is accepted, and they shape this recipe.

*What is imitated.* The model's own greedy answers, and at each position its own distribution (distillation):
`answers.jsonl` is written first, and the hidden states of those texts are the inputs.

*What the head sees.* At the first drafted token, the deep state of the last verified one; after that its own states.
So the head is run `unroll` times over each text: pass k is fed with the states that pass k-1 made of the token before,
and attends to what it would find in its cache: true positions up to its own pass, and one position of each later pass
(as in EAGLE-3, arXiv 2503.01840, "training-time test"). Later passes count less.

*Where it starts.* As the model's last layer, fed with the best linear guess of what enters that layer (least squares on
some texts), which already says something before the first step of training.

*What it can say.* The tokens that are most frequent in the answers; the LM head is the most expensive part of a draft.

The answers themselves draft too: their n-grams are counted and saved beside the head (`decoding.ngram_model`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from layerwise.data import IGNORED, complete_lines, prompt_ids, read_jsonl
from layerwise.data.examples import Tokens
from layerwise.decoding.ngram_model import NGramModel
from layerwise.hub import base_name, from_pretrained
from layerwise.model.causal_lm import EngineName, LayerwiseForCausalLM
from layerwise.model.exit_head import ExitHead
from layerwise.model.frame import Frame
from layerwise.model.runtime import EagerEngine
from layerwise.plan import Plan
from layerwise.sources import load_tokenizer
from layerwise.training.answers import write_answers
from layerwise.training.config import computed_in
from layerwise.training.recipes import FrozenConfig
from layerwise.training.runs import run_training, starting_point, training_arguments
from layerwise.training.trainer import RecipeTrainer

ANSWERS = "answers.jsonl"
FITTED = 64  # texts for the least squares
KEPT_BYTES = 2**31  # of states; those of further texts are computed in every pass over the data
DISCOUNT = 0.8  # weight of pass k+1 beside pass k


class FrozenExit(nn.Module):
    """The loss of the recipe around `model`, whose `exit_head` is the only thing that is trained.

    Args:
        model: with an `exit_head`; its own weights get no gradient.
        unroll: how many drafted tokens the head is trained on in a row.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: LayerwiseForCausalLM, unroll: int = 3) -> None:
        super().__init__()
        model.base.requires_grad_(False)
        self.model = model
        self.unroll = unroll
        self._kept: dict[bytes, tuple[Tensor, ...]] = {}
        self._kept_bytes = 0

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        places: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """Distillation loss on a batch of right-padded rows (rows, width), summed over answer positions.

        Returns:
            `loss`, and as (numerator, denominator): `agreement_1`, ..., the share of positions at which pass k and the
            model have the same likeliest token.
        """
        head = self.model.exit_head
        rows, width = input_ids.shape
        counts = [width] * rows if attention_mask is None else attention_mask.sum(1).tolist()
        early, deep = self._base_states(input_ids, counts)
        # Queries: the positions t whose next token belongs to the answer. Position 0 has nothing before it.
        asked = torch.zeros_like(labels, dtype=torch.bool)
        asked[:, 1:-1] = labels[:, 2:] != IGNORED
        position, valid = _gathered(asked)
        distribution = self._teacher(_take(deep, position))
        loss: Tensor | float = 0.0
        result: dict[str, Tensor] = {}
        frame = Frame(head.backbone(self.model.runtime.backbone), counts, width, deep.device, deep.dtype)
        before = torch.cat([torch.zeros_like(deep[:, :1]), deep[:, :-1]], 1)  # g[t-1]
        everywhere, cached = torch.arange(width, device=deep.device).expand(rows, -1), _Keys()
        states = self._layer(head.join(early, before), frame, everywhere, cached, 0)
        for number in range(self.unroll):
            if number:
                # Pass k at position t is fed the state of pass k-1 at t-1, where that exists, else the deep state.
                fed = _take(torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1), position)
                joined = head.join(_take(early, position), fed)
                found = self._layer(joined, frame, position, cached, number)
                kept = torch.where(valid[..., None], found.to(states.dtype), _take(states, position))
                states = states.scatter(1, position[..., None].expand_as(kept), kept)
            else:
                found = _take(states, position)
            logits = head.head(head.norm(found[valid])).float()
            share = DISCOUNT**number
            loss = loss + share * nn.functional.cross_entropy(logits, distribution[valid], reduction="sum")
            same = (logits.argmax(-1) == distribution[valid].argmax(-1)).sum()
            result[f"agreement_{number + 1}"] = torch.stack([same, valid.sum()]).float()
        return {"loss": loss, **result}

    @torch.no_grad()
    def _teacher(self, deep: Tensor) -> Tensor:
        """The model's distribution over the vocabulary that can be drafted."""
        backbone = self.model.runtime.backbone
        return self.model.exit_head.head(backbone.norm(deep)).float().softmax(-1)

    @torch.no_grad()
    def _base_states(self, input_ids: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """h_E and the last hidden states (rows, width, hidden size); kept for the next pass, up to KEPT_BYTES."""
        keys = [input_ids[row, :count].cpu().numpy().tobytes() for row, count in enumerate(counts)]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = [row for row, key in enumerate(keys) if key not in found]
        if new:
            states = self._computed(input_ids[new], [counts[row] for row in new])
            for row, own in zip(new, states, strict=True):
                found[keys[row]] = own
                if self._kept_bytes < KEPT_BYTES and keys[row] not in self._kept:
                    self._kept[keys[row]] = own
                    self._kept_bytes += sum(one.nbytes for one in own)
        dtype = self.model.exit_head.fuse.weight.dtype
        columns = zip(*(found[key] for key in keys), strict=True)
        *early, deep = (nn.utils.rnn.pad_sequence(list(own), True).to(dtype) for own in columns)
        return (early[0] if early else self.model.embed(input_ids).to(dtype)), deep

    def _computed(self, input_ids: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Of each row h_E and the last hidden states (tokens, hidden size); these alone where h_E is the embedding."""
        exit, full = self.model.exit_head.exit, Plan.full(self.model.depth)
        runtime, rows = self.model.runtime, len(counts)
        states = [self.model.embed(input_ids)]
        if exit:
            states.append(runtime.forward(states[0], [full[:exit]] * rows, counts))
        states.append(runtime.forward(states[-1], [full[exit:]] * rows, counts))
        kept = [one.to(torch.bfloat16) for one in states[1:]]
        return [tuple(one[row, :count].clone() for one in kept) for row, count in enumerate(counts)]

    def _layer(self, joined: Tensor, frame: Frame, position: Tensor, cached: _Keys, number: int) -> Tensor:
        """One pass of the head's layer over the queries at `position` (rows, queries)."""
        head, backbone = self.model.exit_head, frame.backbone
        rotary = backbone.rotary(backbone.kinds[0].rotary, position, frame.width, joined.dtype)
        cached.position = position
        floor = torch.finfo(joined.dtype).min
        columns = torch.arange(frame.width, device=position.device)
        allowed = columns <= position[..., None] - number  # the first pass's
        if number:
            # One key of each later pass: of pass j at position t - k + j.
            later = [cached.positions[j][:, None] == position[..., None] - (number - j) for j in range(1, number)]
            own = position[:, None] == position[..., None]
            allowed = torch.cat([allowed, *later, own], -1)
        mask = torch.where(allowed, 0.0, floor).to(joined.dtype)[:, None]
        return head.layer(
            joined,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cached,
            use_cache=True,
            position_embeddings=rotary,
        )


class _Keys:
    """Keys and values of all passes so far, as a decoder layer sees a cache."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.position: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        self.positions.append(self.position)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def _gathered(asked: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the True entries of each row, packed to the left (rows, most), and which of them count."""
    most = max(1, int(asked.sum(1).max()))
    order = torch.argsort(asked.int(), dim=1, descending=True, stable=True)[:, :most]
    return order, asked.gather(1, order)


def _take(states: Tensor, position: Tensor) -> Tensor:
    return states.gather(1, position[..., None].expand(-1, -1, states.shape[-1]))


@torch.no_grad()
def fit_fuse(model: LayerwiseForCausalLM, texts: Sequence[Sequence[int]], ridge: float = 1e-3) -> None:
    """Set the fuse of the exit head to the least-squares map onto the states that enter the model's last layer.

    `texts` are token ids; 10,000 tokens are enough for a hidden size of 576. `ridge` is relative to the mean square of
    the inputs.
    """
    head, runtime, plan = model.exit_head, model.runtime, Plan.full(model.depth)
    width = head.fuse.in_features
    products = torch.zeros(width, width, dtype=torch.float64)
    targets = torch.zeros(width, head.fuse.out_features, dtype=torch.float64)

    def walk(state: Tensor, begin: int, end: int) -> Tensor:
        return runtime.forward(state, [plan], visits=slice(begin, end)) if end > begin else state

    last = model.depth - 1
    for text in texts:
        early = walk(model.embed(torch.tensor([text])), 0, head.exit)
        state = walk(early, head.exit, last)
        deep = walk(state, last, last + 1)
        like = head.fuse.weight.dtype
        x = (
            torch.cat([head.early_norm(early[0, 1:].to(like)), head.deep_norm(deep[0, :-1].to(like))], -1)
            .double()
            .cpu()
        )
        products += x.T @ x
        targets += x.T @ state[0, 1:].double().cpu()
    products.diagonal().add_(ridge * products.diagonal().mean())
    head.fuse.weight.copy_(torch.linalg.solve(products, targets).T)


def most_frequent(answers: Sequence[Sequence[int]], most: int) -> list[int]:
    """The `most` tokens that occur most often in `answers`, or fewer if there are no more."""
    counts = Counter(token for answer in answers for token in answer)
    return [token for token, _ in counts.most_common(most)]


def train(config: FrozenConfig, notify: Callable[[str], None] = lambda line: None, resume: bool = False) -> Path:
    """Write the model's answers to the prompts of `config.data`, train an exit head on them, save it as an adapter.

    With `config.adapter` the head is for that adapter's model, and is saved together with its weights.

    Raises:
        ValueError: no usable data or model, or an adapter that leaves layers out or repeats them; the folder holds a
            training and `resume` was not asked for, or the reverse; or it holds other answers.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written and `notify` was told how to go on.
    """
    out = Path(config.out)
    starting_point(config, out, resume)  # refused before anything is written
    out.mkdir(parents=True, exist_ok=True)
    answered = _answers(config, out / ANSWERS, notify)
    limit = _limit(config)
    tokens = [Tokens(a["prompt"] + a["answer"], [IGNORED] * len(a["prompt"]) + a["answer"]) for a in answered]
    tokens = [one for one in tokens if len(one.input_ids) <= limit]
    if not tokens:
        raise ValueError(f"'{config.data}' has no prompt whose answer fits into {limit} tokens: raise max-length")
    if len(tokens) < len(answered):
        notify(
            f"{len(answered) - len(tokens)} of {len(answered)} answers left out: with their prompts over {limit} tokens"
        )
    drafted = most_frequent([a["answer"] for a in answered], config.vocabulary)

    def make(steps: int) -> FrozenExit:
        torch.manual_seed(config.seed)
        # With the adapter merged, and the head trained by plain modules.
        model = _load(config, "auto")
        model.runtime.engine = EagerEngine(model.runtime.backbone)
        model.exit_head = ExitHead(model.runtime.backbone, config.exit, drafted).float()
        fit_fuse(model, [one.input_ids for one in tokens[:FITTED]])
        return FrozenExit(model, config.unroll)

    def count(model: LayerwiseForCausalLM, *_: Any) -> None:
        if config.ngrams:
            model.ngrams = NGramModel.fit([(a["prompt"], a["answer"]) for a in answered], config.ngrams)

    return run_training(config, make, RecipeTrainer, notify, resume, (tokens, 0), finish=count)


def _load(config: FrozenConfig, engine: EngineName) -> LayerwiseForCausalLM:
    model = from_pretrained(config.model, adapter=config.adapter, dtype=computed_in(config.precision), engine=engine)
    model.exit_head = model.ngrams = None  # those that the adapter has are replaced
    if model.plan != Plan.full(model.depth):  # what the head learns from
        raise ValueError(f"'{config.adapter or config.model}' does not run every layer once: give an adapter that does")
    return model


def _limit(config: FrozenConfig) -> int:
    return min(config.max_length, config.tokens_per_batch)


def _answers(config: FrozenConfig, path: Path, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """The model's greedy answers to the prompts of `config.data`; the first process writes those that `path` lacks.

    Prompts are left out that would be over the limit with an answer of one token, or over the model's context with the
    longest.
    """
    first = training_arguments(config).process_index == 0  # this is what joins the processes
    examples = read_jsonl(config.data)
    writing: Iterator[int] = iter(())
    if first:
        tokenizer = load_tokenizer(base_name(config.model, config.adapter))
        model, found = _load(config, "auto"), len(examples)
        most = _limit(config) - 1
        if context := model.runtime.backbone.context:
            most = min(most, context - config.max_new_tokens)
        examples = [one for one in examples if len(prompt_ids(one, tokenizer)) <= most]
        if len(examples) < found:
            notify(f"{found - len(examples)} of {found} prompts left out: over {most} tokens")
        writing = write_answers(model, tokenizer, examples, path, config.max_new_tokens)
    # A word to the others after each batch: they would not wait for all answers, but give up after half an hour.
    while (done := broadcast_object_list([next(writing, None)])[0]) is not None:
        if first:
            notify(f"{done} of {len(examples)} answers written")
    return complete_lines(path)
