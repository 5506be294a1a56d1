"""Nets, tasks and benchmarks; they import the package, nobody imports them."""
