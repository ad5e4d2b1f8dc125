"""A small decoder-only language model whose layers mix by routed attention, for the recall study.

Each layer is x + mix(norm(x)), then x + mlp(norm(x)); the mixing is `RoutedAttention`. The sizes of the original study
(4 layers of 128, 4 heads, no positions, 1.12 million weights) are the defaults. `mixing` makes the baselines out of the
same layers: "attention" or "convolution" everywhere.

It is a `PreTrainedModel`: `save_pretrained`, `from_pretrained` and `generate` work as for any other. Its cache is the
part worth reading. Of a position that did not attend only its input is kept, and keys and values are made of it when a
later token attends, of all that waited in one product; the convolution and the router keep what is left of their
windows. Padding stands on the left if a cache is used, so all rows end at the same column.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerwise.model.position_router import Router
from layerwise.model.routed_attention import Mixing, RoutedAttention

_log = logging.getLogger(__name__)
_ROOM = 256  # positions by which a full buffer grows at least


class Columns:
    """The last columns of what grows at its end: (rows, columns, size) in a buffer that is only written behind `end`.

    So a copy (`copy.copy`) made earlier stays true, as long as whoever returns to it forgets what came later.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.end = self.capacity = 0

    def last(self, count: int) -> Tensor:
        """The last `count` columns."""
        assert self.buffer is not None and count <= self.end
        return self.buffer[:, self.end - count : self.end]

    def room(self, count: int, keep: int, like: Tensor) -> None:
        """Make room for `count` columns more; of those that are there the last `keep` may be asked for."""
        if self.end + count > self.capacity:
            # A new one even if the old one has columns to spare in front: an earlier copy may still need them.
            self.capacity = keep + count + max(_ROOM, keep // 4)
            buffer = like.new_empty(len(like), self.capacity, like.shape[2])
            if keep:
                buffer[:, :keep] = self.last(keep)
            self.buffer, self.end = buffer, keep

    def append(self, columns: Tensor, keep: int) -> None:
        """Put `columns` behind; see `room`. They are not copied if nothing is kept."""
        if keep == 0:
            self.replace(columns)
            return
        count = columns.shape[1]
        self.room(count, keep, columns)
        assert self.buffer is not None
        self.buffer[:, self.end : self.end + count] = columns
        self.end += count

    def replace(self, columns: Tensor) -> None:
        """Hold `columns`, not a copy of them, and nothing else."""
        self.buffer, self.end, self.capacity = columns, columns.shape[1], columns.shape[1]


class RoutedLayerCache:
    """What one layer remembers of earlier positions.

    Attributes:
        length: columns seen, padding included.
        made: columns of them with keys and values.
        mixed: columns of them that the convolution has seen.
        reach: how many columns a convolution goes back.
        starts: where each row's tokens start, or None if there is no padding.
        average: the router's moving average (rows, router width).
        inputs: of columns that wait for keys and values, or for the convolution since all attended.
        window: the convolution's last values (rows, taps - 1 or more, hidden size), unless it has none.
        keys, values: buffers (rows, kv heads, capacity, head size), filled up to `made`; None before the first.
    """

    def __init__(self) -> None:
        self.length = self.made = self.mixed = self.reach = 0
        self.starts: list[int] | None = None
        self.average: Tensor | None = None
        self.inputs, self.window = Columns(), Columns()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def advance(self, hidden: Tensor, mask: Tensor | None, reach: int | None) -> None:
        """Note new positions (rows, width, hidden size), which someone may look at, and a convolution that goes back
        `reach` positions may ask for; nobody will if it is None.

        Raises:
            ValueError: padding after a token.
        """
        if mask is not None:
            missing = (~mask).sum(1)
            begun = mask.long().cumsum(1) > 0
            starts = self.starts or [0] * len(hidden)
            late = [start < self.length for start in starts]  # rows whose tokens began in an earlier call
            if bool((begun & ~mask).any()) or any(gap and was for gap, was in zip(missing.tolist(), late, strict=True)):
                raise ValueError("with a cache, rows must be padded on the left: set padding_side='left'")
            self.starts = [start + gap for start, gap in zip(starts, missing.tolist(), strict=True)]
            if not any(self.starts):
                self.starts = None
        if reach is not None:
            self.reach = reach
            self.inputs.append(hidden, self.needed())
        self.length += hidden.shape[1]

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Positions of the last `width` columns (rows or 1, width)."""
        return self.places(self.length - width, self.length, device)

    def places(self, first: int, end: int, device: torch.device) -> Tensor:
        """Positions of the columns `first` to `end` (rows or 1, end - first)."""
        columns = torch.arange(first, end, device=device)[None]
        if self.starts is None:
            return columns
        return (columns - torch.tensor(self.starts, device=device)[:, None]).clamp(min=0)

    def waiting(self) -> int:
        """How many of the last columns a convolution would ask for and has not seen."""
        return min(self.length - self.mixed, self.reach)

    def room(self, reach: int, token: Tensor) -> int:
        """Make room for one `token` more, of which a convolution may want `reach` others; how many of those wait."""
        self.reach, inputs, window = reach, self.inputs, self.window
        waiting = min(self.length - self.mixed, reach)
        if inputs.end == inputs.capacity:
            inputs.room(1, self.needed(), token)
        if window.end + waiting >= window.capacity:
            window.room(waiting + 1, min(window.end, reach), token)
        return waiting

    def waiting_before(self, width: int) -> Tensor | None:
        """Inputs that wait for the convolution, in front of the last `width` columns."""
        count = min(self.length - width - self.mixed, self.reach)
        return self.inputs.last(width + count)[:, :count] if count else None

    def needed(self) -> int:
        """How many of the last inputs may still be asked for."""
        return max(self.length - self.made, self.waiting())

    def keys_and_values(
        self, project: Callable[[Tensor, int, int], tuple[Tensor, Tensor]], needed: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv heads, needed, head size); made now for columns that have none yet.

        `project` makes them of inputs (rows, width, hidden size), given the first column and one past the last.
        """
        if needed > self.made:
            inputs = self.inputs.last(self.length - self.made)[:, : needed - self.made]
            keys, values = project(inputs, self.made, needed)
            buffers = self.key_room(needed, keys.shape[1], keys.shape[3], keys)
            for buffer, new in zip(buffers, (keys, values), strict=True):
                buffer[:, :, self.made : needed] = new
            self.made = needed
            if self.inputs.end > self.needed() + _ROOM:  # a text's inputs are large
                self.inputs.replace(self.inputs.last(self.needed()).clone())
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, :needed], self.values[:, :, :needed]

    def key_room(self, needed: int, heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers of keys and of values (rows, heads, `needed` columns or more, size), of rows and dtype of `like`."""
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.shape[2] < needed:
            capacity = needed + max(_ROOM, needed // 4)
            grown = [like.new_empty(len(like), heads, capacity, size) for _ in range(2)]
            for larger, buffer in zip(grown, (keys, values), strict=True):
                if buffer is not None:
                    larger[:, :, : self.made] = buffer[:, :, : self.made]
            self.keys, self.values = keys, values = grown
        return keys, values

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to come back to this point; buffers are shared, not copied."""
        return {**self.__dict__, "inputs": copy(self.inputs), "window": copy(self.window)}

    def restore(self, state: dict[str, Any]) -> None:
        """Forget everything since `snapshot`."""
        buffers = (self.keys, self.values)
        self.__dict__.update({**state, "inputs": copy(state["inputs"]), "window": copy(state["window"])})
        if self.made and buffers[0] is not None:
            self.keys, self.values = buffers  # grown since, perhaps; what was made then is in them

    def reorder(self, rows: Tensor) -> None:
        """Keep `rows`, in this order."""

        def picked(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.index_select(0, rows)

        self.average, self.keys, self.values = (picked(one) for one in (self.average, self.keys, self.values))
        for columns in (self.inputs, self.window):
            columns.buffer = picked(columns.buffer)
        if self.starts is not None:
            self.starts = [self.starts[row] for row in rows.tolist()]


class RoutedCache:
    """A `RoutedLayerCache` for each of `layers` layers; what `generate` passes along as past_key_values."""

    is_compileable = False

    def __init__(self, layers: int) -> None:
        self.layers = [RoutedLayerCache() for _ in range(layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.layers[layer_idx].length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder(beam_idx)


class RecallModelConfig(PretrainedConfig):
    """Sizes of a `RecallModel`; `mixing` is "routed", "attention" or "convolution". See `RoutedAttention`."""

    model_type = "layerwise_recall"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int | None = None,
        kernel_size: int = 64,
        router_width: int | None = None,
        rope_theta: float | None = None,
        initial_usage: float = 0.5,
        mixing: Mixing = "routed",
        **kwargs: Any,
    ) -> None:
        if mixing not in Mixing.__args__:
            raise ValueError(f"no mixing '{mixing}': choose {', '.join(Mixing.__args__)}")
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.kernel_size, self.router_width = num_attention_heads, kernel_size, router_width
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.rope_theta, self.initial_usage, self.mixing = rope_theta, initial_usage, mixing
        kwargs.setdefault("tie_word_embeddings", False)
        # Not the usual 0.02: in a model so narrow, all scores of attention would begin near zero and learn too late.
        kwargs.setdefault("initializer_range", hidden_size**-0.5)
        super().__init__(**kwargs)


@dataclass
class RoutedOutput(CausalLMOutputWithPast):
    """As usual, and `gates` and `route_logits`, (layers, rows, width) each; see `Routing`."""

    gates: Tensor | None = None
    route_logits: Tensor | None = None


class RecallLayer(nn.Module):
    """Mixing and MLP, each on the normalised residual stream."""

    def __init__(self, config: RecallModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.mix_norm = nn.LayerNorm(size)
        self.mix = RoutedAttention(
            size,
            config.num_attention_heads,
            kernel_size=config.kernel_size,
            router_width=config.router_width,
            rope_theta=config.rope_theta,
            initial_usage=config.initial_usage,
        )
        self.mix.mixing = config.mixing
        self.mlp_norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, size)


class RecallModel(PreTrainedModel, GenerationMixin):
    """The model; see the module's text."""

    config_class = RecallModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012 (transformers reads it so)

    def __init__(self, config: RecallModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RecallLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RoutedAttention):
            module.start_taps()
        elif isinstance(module, Router):  # after its linear maps, whose biases were set to zero
            module.start()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def prepare(self, notify: Callable[[str], None] = _log.info) -> bool:
        """Decode the single tokens of one row by operators made for that; False if a layer cannot, or if there is no
        compiler. See `RoutedAttention.prepare`; `generate` does this itself."""
        return all([layer.mix.prepare(notify) for layer in self.layers])

    def generate(self, *args: Any, **options: Any) -> Any:
        """As in transformers."""
        if self.device.type == "cpu":
            self.prepare()
        return super().generate(*args, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: RoutedCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **_: Any,
    ) -> dict[str, Any]:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        gates: Tensor | None = None,
        **_: Any,
    ) -> RoutedOutput:
        """One pass.

        Args:
            input_ids: (rows, width) token ids.
            attention_mask: (rows, columns cached and new), ones for tokens and zeros for padding, on either side; on
                the left if there is a cache.
            past_key_values: continued in place. With `use_cache=True` a new one is made.
            labels: (rows, width), -100 where no loss is wanted; shifted inside, as in transformers.
            gates: (layers, rows, width) who attends, instead of the routers.

        Returns:
            loss (if labels), logits (rows, width, vocabulary), the cache (if any), gates and router logits.
        """
        if use_cache and past_key_values is None:
            past_key_values = RoutedCache(len(self.layers))
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :].bool()
            mask = None if bool(mask.all()) else mask
        hidden = self.embedding(input_ids)
        chosen, logits = [], []
        for number, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values.layers[number]
            mixed, routing = layer.mix(layer.mix_norm(hidden), mask, cache, None if gates is None else gates[number])
            hidden = hidden + mixed
            hidden = hidden + layer.down(F.gelu(layer.up(layer.mlp_norm(hidden))))
            chosen.append(routing.gate)
            logits.append(routing.logits)
        scores = self.lm_head(self.norm(hidden))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return RoutedOutput(
            loss=loss,
            logits=scores,
            past_key_values=past_key_values,
            gates=torch.stack(chosen),
            route_logits=torch.stack(logits),
        )
