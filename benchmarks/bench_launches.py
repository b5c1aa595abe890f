"""`make bench-launches`: operations that a GPU would be given for a step, counted without one.

    python benchmarks/bench_launches.py [--json FILE] [--write]

A model on a pretended GPU, whose tensors have shapes and no numbers: what is dispatched there is what a GPU would be
given, but for operations that only look at memory in another way. Counted for plain QLoRA with peft (c) and qunlearn
(d), a decoder block's as the difference between two depths, the rest of a step as what is left at depth 0.
"""
