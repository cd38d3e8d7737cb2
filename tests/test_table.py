"""Tables for a terminal, with rich and without."""

import importlib.util
from unittest import mock

import pytest

from msa_compile.table import to_table


@pytest.mark.parametrize("rich", [True, False])
def test_cells_stand_under_their_heads(rich):
    if rich and not importlib.util.find_spec("rich"):
        pytest.skip("rich is not installed")
    find = importlib.util.find_spec
    with mock.patch("importlib.util.find_spec", lambda name: find(name) if rich else None):
        text = to_table(("name", "tokens"), [("a", "5"), ("longer", "1234567")], left=("name",))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines == ["name     tokens", "a             5", "longer  1234567"]
