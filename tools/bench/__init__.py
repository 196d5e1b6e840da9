"""Benchmarks: one file a workload, one table a file, all written to ``docs/benchmarks.md``."""
