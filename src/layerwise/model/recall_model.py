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


class RoutedLayerCache:
    """What one layer remembers of earlier positions.

    Attributes:
        length: columns seen, padding included.
        made: columns of them with keys and values; the inputs of the others wait.
        starts: where each row's tokens start, or None if there is no padding.
        average: the router's moving average (rows, router width).
        window: the convolution's last values (rows, taps - 1 or more, hidden size).
        waiting: inputs of later tokens that the convolution has not seen yet, since all attended.
    """

    def __init__(self) -> None:
        self.length = self.made = 0
        self.starts: list[int] | None = None
        self.average: Tensor | None = None
        self._window: Tensor | None = None
        self._buffer: Tensor | None = None  # takes the place of `_window` while single tokens are decoded
        self._filled = 0
        self.waiting: list[Tensor] = []
        self._pending: list[Tensor] = []
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def advance(self, hidden: Tensor, mask: Tensor | None, keep: bool = True) -> None:
        """Note new positions (rows, width, hidden size), which someone may look at if `keep`.

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
        if keep:
            self._pending.append(hidden)
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

    @property
    def window(self) -> Tensor | None:
        return self._window if self._buffer is None else self._buffer[:, : self._filled]

    @window.setter
    def window(self, values: Tensor) -> None:
        self._window, self._buffer = values, None

    def room(self, tokens: int, reach: int, like: Tensor) -> tuple[Tensor, int]:
        """A buffer (rows, capacity, hidden size) for values of the convolution with room for `tokens` more, and how
        many it holds: the last `reach` or more, if there were so many. See `fill`."""
        buffer, filled = self._buffer, self._filled
        if buffer is None or filled + tokens > buffer.shape[1]:
            kept = self.window
            kept = (
                like.new_zeros(len(like), 0, like.shape[2])
                if kept is None
                else kept[:, max(0, kept.shape[1] - reach) :]
            )
            filled = kept.shape[1]
            # A new one even if the old one has room: a snapshot may still hold that.
            buffer = like.new_empty(len(like), filled + tokens + _ROOM, like.shape[2])
            buffer[:, :filled] = kept
            self._window, self._buffer, self._filled = None, buffer, filled
        return buffer, filled

    def fill(self) -> None:
        """The values of those that waited and of one token more are in the buffer now."""
        self._filled += 1 + sum(one.shape[1] for one in self.waiting)
        self.waiting = []

    def wait(self, hidden: Tensor, reach: int) -> None:
        """Keep the last `reach` inputs for a convolution that may come."""
        if reach == 0:
            return
        if hidden.shape[1] >= reach:
            self.waiting = [hidden[:, -reach:].clone()]
            return
        self.waiting.append(hidden)
        if len(self.waiting) > 2 * reach:  # now and then: dropping what no window reaches is not urgent
            self.waiting = [torch.cat(self.waiting, dim=1)[:, -reach:]]

    def keys_and_values(
        self, project: Callable[[Tensor, int, int], tuple[Tensor, Tensor]], needed: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv heads, needed, head size); made now for columns that have none yet.

        `project` makes them of inputs (rows, width, hidden size), given the first column and one past the last.
        """
        if needed > self.made:
            inputs = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending, dim=1)
            count = needed - self.made
            keys, values = project(inputs[:, :count], self.made, needed)
            self._pending = [inputs[:, count:].clone()] if count < inputs.shape[1] else []
            self._keys = self._store(self._keys, keys)
            self._values = self._store(self._values, values)
            self.made = needed
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, :needed], self._values[:, :, :needed]

    def _store(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        end = self.made + new.shape[2]
        if buffer is None or buffer.shape[2] < end:
            rows, heads, _, size = new.shape
            larger = new.new_empty(rows, heads, end + max(_ROOM, end // 4), size)
            if buffer is not None:
                larger[:, :, : self.made] = buffer[:, :, : self.made]
            buffer = larger
        buffer[:, :, self.made : end] = new
        return buffer

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to come back to this point; buffers are shared, not copied."""
        state = dict(self.__dict__)
        return {**state, "waiting": list(self.waiting), "_pending": list(self._pending)}

    def restore(self, state: dict[str, Any]) -> None:
        """Forget everything since `snapshot`."""
        buffers = (self._keys, self._values)
        self.__dict__.update({**state, "waiting": list(state["waiting"]), "_pending": list(state["_pending"])})
        if self.made and buffers[0] is not None:
            self._keys, self._values = buffers  # grown since, perhaps; what was made then is in them

    def reorder(self, rows: Tensor) -> None:
        """Keep `rows`, in this order."""

        def picked(value: Any) -> Any:
            return value.index_select(0, rows) if isinstance(value, Tensor) else value

        for name, value in self.__dict__.items():
            self.__dict__[name] = [picked(one) for one in value] if isinstance(value, list) else picked(value)
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
