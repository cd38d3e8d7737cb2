"""Random spellings of attention: found where they should be, right with every block and with few.

`make grammar` checks thousands; its last tally is `benchmarks/results/grammar.md`.
"""

import pytest

from benchmarks.grammar.check import check_spelling
from benchmarks.grammar.spellings import draw

# The first ones, some that were wrong once (masks merged for a bmm, heads repeated from a slice of a cache), and some
# for the words that these lack.
SEEDS = [*range(36), 36, 44, 52, 73, 84, 88, 107, 128, 46, 86]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_spelling_is_found_and_right(seed):
    spelling = draw(seed)
    outcome = check_spelling(spelling, seed)
    assert not outcome.wrong, spelling


def test_the_seeds_say_every_word_of_the_grammar():
    said = [draw(seed) for seed in SEEDS]
    assert {s.product for s in said} == {
        "sdpa", "matmul", "einsum", "bmm", "baddbmm", "grouped einsum", "broadcast", "multi-query",
    }  # fmt: skip
    assert {s.repeat for s in said} == {"expand", "interleave", "enable_gqa", "equal", "grouped"}
    assert {s.cache for s in said} == {"none", "concat", "slice"}
    assert {s.mask for s in said} == {
        "tril", "arange", "additive", "minimum", "padding", "padding added", "window", "none", "bias", "flag",
    }  # fmt: skip
    assert {s.rope for s in said} == {"none", "half", "interleaved", "complex", "partial"}
    assert {s.extra for s in said} == {"none", "softcap", "sinks"}
