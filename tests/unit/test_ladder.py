"""What is tried next, played against every possible edge."""

from __future__ import annotations

import pytest

from lightning_compress.ladder import next_bits, next_sparsity


@pytest.mark.parametrize("edge", [0.0, 0.1, 0.37, 0.5, 0.8, 0.93, 0.985, 1.0])
def test_it_ends_just_below_the_edge(edge: float) -> None:
    good, failed, tried = 0.0, None, 0
    while (asked := next_sparsity(good, failed, 0.99)) is not None:
        assert good < asked <= 0.99
        good, failed = (asked, failed) if asked <= edge else (good, asked)
        tried += 1
        assert tried < 30
    assert good <= edge
    # what is left of the way is less than a tenth of the weights left, or bisected down to it
    assert edge - good <= 0.25 * (1 - good) or good == 0.99


def test_the_most_is_never_passed_and_may_be_one() -> None:
    assert next_sparsity(0.9, None, 0.92) == 0.92
    assert next_sparsity(0.92, None, 0.92) is None
    assert next_sparsity(0.9, 1.0, 1.0) == pytest.approx(0.95)


def test_bits_fall_and_end_at_what_fails() -> None:
    assert next_bits(8, None, (6, 4, 3)) == 6
    assert next_bits(4, None, (6, 4, 3)) == 3
    assert next_bits(3, None, (6, 4, 3)) is None
    assert next_bits(6, 4, (6, 4, 3)) is None
    assert next_bits(8, None, ()) is None
