"""What is tried next, played against every possible edge."""

from __future__ import annotations

import pytest

from lightning_compress.guard_steps import StepPolicy, next_bits, next_sparsity


def play(edges: list[float]) -> list[tuple[float, bool]]:
    """What is asked for, and whether it held, where the edge moves from judgement to judgement."""
    policy, good, tried = StepPolicy(0.5, 0.1), 0.0, []
    for edge in edges:
        asked = next_sparsity(good, policy.step, 0.99) if policy.ready() else None
        if asked is None:
            continue
        assert good < asked <= 0.99
        tried.append((asked, asked <= edge))
        if asked <= edge:
            good = asked
            policy.held()
        else:
            policy.missed()
    return tried


@pytest.mark.parametrize("edge", [0.0, 0.1, 0.37, 0.5, 0.8, 0.93, 0.985, 1.0])
def test_it_ends_just_below_the_edge_and_seldom_tries_again(edge: float) -> None:
    tried = play([edge] * 100)
    good = max((asked for asked, held in tried if held), default=0.0)
    assert good <= edge
    assert edge - good <= 0.1 * (1 - good) + 1e-9 or good == 0.99
    assert len(tried) < 35


def test_an_edge_that_moves_is_followed() -> None:
    tried = play([0.5] * 30 + [0.95] * 60)
    assert max(asked for asked, held in tried if held) > 0.93


def test_the_waits_double_at_the_smallest_step() -> None:
    policy, waits = StepPolicy(0.1, 0.1), []
    for _ in range(4):
        policy.missed()
        waits.append(1)
        while not policy.ready():
            waits[-1] += 1
    assert waits == [2, 4, 8, 16]
    policy.held()
    assert policy.ready()


def test_the_most_is_never_passed() -> None:
    assert next_sparsity(0.9, 0.5, 0.92) == 0.92
    assert next_sparsity(0.92, 0.5, 0.92) is None
    assert next_sparsity(0.5, 0.5, 1.0) == 0.75


def test_bits_fall_and_end() -> None:
    assert next_bits(8, (6, 4, 3)) == 6
    assert next_bits(4, (6, 4, 3)) == 3
    assert next_bits(3, (6, 4, 3)) is None
    assert next_bits(8, ()) is None
