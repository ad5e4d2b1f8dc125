"""Batches made once for a whole training, which any number of processes share: see `training.trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset

from layerwise.data.examples import IGNORED, Tokens, length_sorted_batches

Item = tuple[int, int, bool]  # example, place in the global batch, and whether its labels count


class GlobalBatches:
    """The batches of one process, for all steps of a training, as a batch sampler of `Item`s.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: most tokens of a batch, over all processes and with padding.
        steps, accumulation: `accumulation` batches make one of `steps` optimizer steps.
        seed: the order; every pass through the data has another.
        process, processes: which share of every batch is this one's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        steps: int,
        accumulation: int = 1,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.batches: list[list[int]] = []
        passes = 0
        while len(self.batches) < steps * accumulation:
            self.batches += length_sorted_batches(lengths, tokens_per_batch, seed + passes)
            passes += 1
        del self.batches[steps * accumulation :]
        self.accumulation = accumulation
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Item]]:
        before = 0  # rows of the same optimizer step in earlier batches
        for number, batch in enumerate(self.batches):
            before = 0 if number % self.accumulation == 0 else before
            items = [(example, before + row, True) for row, example in enumerate(batch)]
            mine = items[self.process :: self.processes]
            # A process without a row must still take part in the exchange of gradients.
            yield mine or [(batch[0], before, False)]
            before += len(batch)


class Examples(Dataset):
    """What the items of `GlobalBatches` are: an example's tokens, and its place."""

    def __init__(self, examples: Sequence[Tokens]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: Item) -> tuple[Tokens, int]:
        number, place, counts = item
        tokens = self.examples[number]
        return (tokens if counts else Tokens(tokens.input_ids, [IGNORED] * len(tokens.labels))), place
