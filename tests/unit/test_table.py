"""How the behaviour matrix is printed."""

from __future__ import annotations

from ..table import draw


def test_a_table_for_each_method_in_the_order_of_the_names_given() -> None:
    cells = {("b", "mlp", "bf16"): "ok", ("a", "lstm", "bf16"): "not on this CPU", ("a", "mlp", "resume"): "failed"}
    lines = list(draw(cells, ["a", "b", "c"], ["mlp", "lstm"], ["resume", "ema", "bf16"]))
    assert [" ".join(line.split()) for line in lines] == [
        "a resume bf16",
        "mlp failed -",
        "lstm - not on this CPU",
        "b resume bf16",
        "mlp - ok",
    ]
    ends = {len(line) for line in lines[:3]}
    assert len(ends) == 1
