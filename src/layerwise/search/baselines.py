"""What the tree has to beat, at the same number of evaluations."""

from __future__ import annotations

import random

from layerwise.plan import Plan
from layerwise.search.objective import Book
from layerwise.search.tree import Prior, draw, edits, uniform

MOST_EDITS = 6
ATTEMPTS = 100  # random plans in a row that are all known already: the space is used up


def random_search(book: Book, chance: random.Random, *, batch: int = 4, prior: Prior = uniform) -> None:
    """Plans of one to MOST_EDITS random edits, each number as likely as another."""
    failed = 0
    while book.left and failed < ATTEMPTS:
        plans: dict[Plan, None] = {}
        while len(plans) < min(batch, book.left) and failed < ATTEMPTS:
            plan = book.full
            for _ in range(chance.randint(1, MOST_EDITS)):
                drawn = draw(edits(plan, book.layers), prior, chance)
                plan = drawn[0].apply(plan) if drawn else plan
            known = plan in book.margins or plan in plans
            failed = failed + 1 if known else 0
            if not known:
                plans[plan] = None
        book.values(list(plans))


def greedy_search(
    book: Book, chance: random.Random, *, width: int = 12, batch: int = 4, prior: Prior = uniform
) -> None:
    """Hill climbing: go to the best of `width` neighbours if it is better, else try further neighbours.

    At a plan whose neighbours are all known and worse, it starts again from the full plan, with other draws.
    """
    plan, untried = book.full, draw(edits(book.full, book.layers), prior, chance)
    stuck = 0
    while book.left and stuck < ATTEMPTS:
        (best,) = book.values([plan])
        drawn, untried = untried[:width], untried[width:]
        neighbours = list(dict.fromkeys(edit.apply(plan) for edit in drawn))
        new = [one for one in neighbours if one not in book.margins][: book.left]
        for at in range(0, len(new), batch):
            book.values(new[at : at + batch])
        stuck = 0 if new else stuck + 1
        known = [one for one in neighbours if one in book.margins]
        winner = max(known, key=lambda one: book.values([one])[0], default=plan)
        if known and book.values([winner])[0] > best:
            plan = winner
        elif not untried:
            plan = book.full
        else:
            continue
        untried = draw(edits(plan, book.layers), prior, chance)
