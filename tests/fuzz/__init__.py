"""Random programs against a dense oracle.

A *program* is the source text of a model, what is done with it (calls, changes, switches), and how it is
adapted. :mod:`tests.fuzz.grammar` writes one, :mod:`tests.fuzz.judge` runs it beside the original model
with ``W' = W + s·BA`` in the place of its weights, in fp64, and says what came of it: the same numbers, a
typed refusal, other numbers, another exception, a dead process. The last three are failures.

    python -m tests.fuzz --programs 10000 --seed 0

prints how many programs came to which end, and the source of each failure.
"""
