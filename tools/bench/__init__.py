"""Benchmarks, whose tables are written to ``docs/benchmarks.md``.

A contender is a model whose step or run is timed. The frozen contender has no adapters. O, the overhead, is
the time of a step divided by the time of the frozen step. F, the floor, is the same ratio by FLOPs alone, and
η is F / O. A/A is the same contender under a second name, whose ratio to the first shows the noise.
"""
