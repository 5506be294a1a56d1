"""Analysis: what a model holds, and what its compression bought."""
