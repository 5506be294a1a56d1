"""Checks of arguments: what they let through, and what they say."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lightning_compress.checks import (
    check_by_name,
    check_callable,
    check_flag,
    check_instance,
    check_names,
    check_number,
    check_numbers,
    check_one_of,
    check_path,
    check_whole_number,
    first_line,
    shown,
)


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_numbers_within_bounds_pass(value):
    check_number("x", value, "a share in 0..1", low=0, high=1)


REFUSED = [
    (True, "Give a number, not True."),
    ("0.5", "Give the number itself, without quotes."),
    ("half", "Give a number, not a str."),
    (None, "Give a number, not None."),
    (math.nan, "Give a number that is finite."),
    (-math.inf, "Give a number that is finite."),
    (10**400, "Give a number that is finite."),
    (-0.1, "Give a number within these bounds."),
    (1.1, "Give a number within these bounds."),
    ((0.5,), "Give a number, not a tuple."),
    (float, "Give a number, not a class."),
    # a checkpoint with these in it would not load with weights_only=True
    (np.float64(0.25), "Give float(...) of it, a number of Python's own."),
    (np.int64(1), "Give float(...) of it, a number of Python's own."),
    (torch.tensor(0.5), "Give float(...) of it, a number of Python's own."),
]


@pytest.mark.parametrize(("value", "fix"), REFUSED)
def test_what_is_no_number_within_bounds_is_refused_with_how_to_fix_it(value, fix):
    message = f"GradualPruning.floor={shown(value)}: accepted is a share in 0..1. {fix}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_number("GradualPruning.floor", value, "a share in 0..1", low=0, high=1)


def test_open_bounds_are_excluded():
    for value in (0, 1):
        with pytest.raises(ValueError, match=r"x=.: accepted"):
            check_number("x", value, "a number between 0 and 1", above=0, below=1)
    check_number("x", 0.5, "a number between 0 and 1", above=0, below=1)


@pytest.mark.parametrize(
    ("value", "fix"),
    [(True, "whole number, not True"), (2.0, "2"), (2.5, "whole number within"), (0, "whole number within")],
)
def test_what_is_no_whole_number_within_bounds_is_refused(value, fix):
    with pytest.raises(ValueError, match=rf"accepted is a whole number in 1..8. Give (a )?{fix}"):
        check_whole_number("x", value, "a whole number in 1..8", low=1, high=8)


def test_one_of_tells_kinds_of_value_apart():
    check_one_of("x", 1, (0, 1))
    with pytest.raises(ValueError, match=r"x=True: accepted are 0 and 1. Take 0 if in doubt. Give one of them."):
        check_one_of("x", True, (0, 1), "Take 0 if in doubt.")


def test_an_instance_of_a_subclass_passes():
    check_instance("x", True, int, "a whole number")
    with pytest.raises(TypeError, match=r"x='1': accepted is a whole number."):
        check_instance("x", "1", int, "a whole number")


def test_a_class_is_to_be_called():
    with pytest.raises(TypeError, match=r"Make an object of the class: OrderedDict\(\)\."):
        check_instance("x", OrderedDict, dict, "a dict")


@pytest.mark.parametrize("value", [True, False])
def test_flags_pass(value):
    check_flag("x", value)


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ("false", "Give False, without quotes."),
        ("True", "Give True, without quotes."),
        (1, "Give True."),
        (2, "Give one of the two."),
        (None, "Give one of the two."),
        ([], "Give one of the two."),
        (np.bool_(True), "Give one of the two."),
    ],
)
def test_what_python_would_count_as_true_or_false_is_refused(value, fix):
    with pytest.raises(TypeError, match=rf"^x={re.escape(shown(value))}: accepted is True or False\. {fix}$"):
        check_flag("x", value)


@pytest.mark.parametrize("value", [(), ["head"], ("a", "b.*")])
def test_lists_of_names_pass(value):
    check_names("x", value)


@pytest.mark.parametrize("value", ["head", 3, None, {"head"}, (n for n in ["head"]), [1], [""], [None], [["a"]]])
def test_what_is_no_list_of_names_is_refused(value):
    with pytest.raises(TypeError, match=r"x.*accepted is a .*(list|name)"):
        check_names("x", value)


@pytest.mark.parametrize("value", ["0.5", 0.5, None, [2], ["0.5"], [math.nan], [0.5, True]])
def test_what_is_no_list_of_numbers_is_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"x.*accepted is a list"):
        check_numbers("x", value, "a list of shares", low=0, high=1)


@pytest.mark.parametrize("value", [["a"], "a", None, {1: 2}, {"": 2}])
def test_what_is_no_dict_by_name_is_refused(value):
    with pytest.raises(TypeError, match=r"x.*accepted is a (dict|name)"):
        check_by_name("x", value, "a dict")


@pytest.mark.parametrize("value", ["", " ", None, 3, b"a", ["a"], "a" + chr(0)])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(TypeError, match=r"x=.*accepted is a folder\. Give it as text or as a Path"):
        check_path("x", value, "a folder")


def test_what_a_function_returned_is_no_function():
    check_callable("x", len, "a function")
    with pytest.raises(TypeError, match=r"x=0.5: accepted is a function\. Give a function, not what it returns"):
        check_callable("x", 0.5, "a function")


def test_a_value_is_shown_in_one_line_whatever_it_is():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert shown(Broken()) == "<Broken>"
    assert shown(10**5000) == "<int>"
    assert shown(torch.zeros(2, 2)) == "tensor([[0., 0.], [0., 0.]])"


def test_an_error_without_a_message_is_its_class():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("\none\ntwo")) == "ValueError: one"
