"""Benchmarks: ``python -m experiments.bench NAME --json PATH`` prints a table and writes headline and rows."""
