"""Checks of arguments: what they let through, and what they say."""

import math
import re

import numpy as np
import pytest

from lightning_compress.checks import check_instance, check_number, check_one_of, check_whole_number, first_line


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float64(0.5)])
def test_numbers_within_bounds_pass(value):
    check_number("x", value, "a share in 0..1", low=0, high=1)


@pytest.mark.parametrize("value", [True, "0.5", None, math.nan, math.inf, -0.1, 1.1, [0.5]])
def test_what_is_no_number_within_bounds_is_refused_with_what_was_given(value):
    message = f"GradualPruning.floor={value!r}: accepted is a share in 0..1."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_number("GradualPruning.floor", value, "a share in 0..1", low=0, high=1)


def test_open_bounds_are_excluded():
    for value in (0, 1):
        with pytest.raises(ValueError, match=r"x=.: accepted"):
            check_number("x", value, "a number between 0 and 1", above=0, below=1)
    check_number("x", 0.5, "a number between 0 and 1", above=0, below=1)


@pytest.mark.parametrize("value", [True, 1.0, 0, 9])
def test_what_is_no_whole_number_within_bounds_is_refused(value):
    with pytest.raises(ValueError, match=r"accepted is a whole number in 1..8"):
        check_whole_number("x", value, "a whole number in 1..8", low=1, high=8)


def test_one_of_tells_kinds_of_value_apart():
    check_one_of("x", 1, (0, 1))
    with pytest.raises(ValueError, match=r"x=True: accepted are 0 and 1. Take 0 if in doubt."):
        check_one_of("x", True, (0, 1), "Take 0 if in doubt.")


def test_an_instance_of_a_subclass_passes():
    check_instance("x", True, int, "a whole number")
    with pytest.raises(TypeError, match=r"x='1': accepted is a whole number."):
        check_instance("x", "1", int, "a whole number")


def test_an_error_without_a_message_is_its_class():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\none\ntwo")) == "ValueError: one"
