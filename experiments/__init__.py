"""Reference models, data and benchmarks; they import the package, nobody imports them."""
