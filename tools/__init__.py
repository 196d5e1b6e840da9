"""Benchmarks, the command line, the model zoo and other programs around the library.

See docs/architecture.md.
"""
