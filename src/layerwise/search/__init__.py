"""Search for better paths through the layers, question by question.

`tree`: what can be done to a plan, and what was tried; `mcts` and `baselines`: which plans are tried next; `evaluator`:
how good plans are, many at once; `labels`: what was found, in a file; `fanout`: many questions at a time.
"""
