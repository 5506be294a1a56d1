"""The tests; what an assertion of these helpers compared is shown as in a test."""

import pytest

pytest.register_assert_rewrite("tests.harness", "tests.behaviour.methods", "tests.behaviour.properties")
