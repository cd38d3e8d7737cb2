"""The bar of long work: there where tqdm is, silent where it is not wanted or not installed, closed on an error."""

import importlib.util
from unittest import mock

import pytest

from msa_compile.progress import progress_bar


def test_a_bar_counts_and_is_closed_on_an_error(capsys):
    pytest.importorskip("tqdm", reason="a bar needs the viz extra")
    with pytest.raises(KeyboardInterrupt), progress_bar("searching", "stone", total=4) as bar:  # noqa: PT012
        bar.update(3)
        bar.set_postfix_str("a hint")
        raise KeyboardInterrupt
    shown = capsys.readouterr().err
    assert "searching" in shown
    assert "3/4" in shown
    assert shown.endswith("\n"), "what follows starts on a line of its own"


@pytest.mark.parametrize("reason", ["not wanted", "not installed"])
def test_there_is_silence_where_there_is_no_bar(reason, capsys):
    is_missing = reason == "not installed"
    find = importlib.util.find_spec
    with (
        mock.patch("importlib.util.find_spec", lambda name: None if is_missing else find(name)),
        progress_bar("searching", "stone", shown=is_missing) as bar,
    ):
        bar.update()
        bar.set_postfix_str("a hint")
    assert capsys.readouterr().err == ""
