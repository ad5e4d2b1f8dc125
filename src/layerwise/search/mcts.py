"""Monte Carlo tree search over plans.

    select    from the root, while a node has nothing left to try: the child with the highest upper confidence bound
    expand    try the node's next edits: a few children at once, evaluated as one batch
    back up   add their values to every node above

The bound is UCB1 (Auer et al., 2002): Q/v + c sqrt(ln V / v), with V the *parent's* visits. The length of a path is in
the value (see `objective`), where Dr.LLM subtracts it from the bound. There are no roll-outs: every plan in the tree is
complete, and is evaluated itself.

A node is expanded fully before the search descends below it. (Dr.LLM's released code descends as soon as a node has one
child, which makes the tree a chain and the search a random walk.) Siblings are expanded a batch at a time, which
changes nothing while a node would have been selected again anyway.
"""

from __future__ import annotations

import math
import random

from layerwise.search.objective import Book
from layerwise.search.tree import Node, Prior, Tree, uniform


def mcts(
    book: Book,
    chance: random.Random,
    *,
    width: int = 4,
    batch: int = 4,
    exploration: float = 0.05,
    prior: Prior = uniform,
) -> Tree:
    """Evaluate plans until the book's budget is used up, or nothing is left to try.

    Args:
        width: edits that a node tries; `batch` of them at once.
        exploration: c of the bound; values lie within an interval of length 1.
    """
    (first,) = book.values([book.full])
    tree = Tree(book.layers, first, chance, width, prior)
    while book.left and not tree.root.exhausted:
        node = select(tree.root, exploration)
        plans = tree.next_plans(node, min(batch, book.left))
        tree.expand(node, plans, book.values(plans))
    return tree


def select(root: Node, exploration: float) -> Node:
    """The node to expand next: the first on the way down that has something left to try."""
    node = root
    while not node.untried:
        open_children = [child for child in node.children if not child.exhausted]
        node = max(open_children, key=lambda child: bound(child, node.visits, exploration))
    return node


def bound(child: Node, visits: int, exploration: float) -> float:
    """The upper confidence bound of a child whose parent has `visits` visits."""
    return child.mean + exploration * math.sqrt(math.log(visits) / child.visits)
