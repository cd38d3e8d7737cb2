"""Sizes of a proof lie inside the guards of the graph that it proves."""

import pytest
import torch
from tiny_attention import capture, tokens

from msa_compile.passes.choose_sizes import SizeSpace
from msa_compile.passes.graph_facts import tensor_value
from msa_compile.passes.replay import bind, concrete, expression


def space_of(function, *args):
    captured = capture(function, *args)
    x = next(v for n in captured.graph.nodes if (v := tensor_value(n)) is not None and v.dim() == 3)
    batch, length = x.shape[:2]
    return SizeSpace([batch, length]), batch, length


def symbol(size):
    (found,) = expression(size).free_symbols
    return found


def test_a_bound_of_a_branch_is_kept():
    space, _, length = space_of(lambda x: x * 2 if x.shape[1] > 10 else x, tokens(3, 13))
    assert space.holds({symbol(length): 11})
    assert not space.holds({symbol(length): 10})
    samples = list(space.samples([symbol(length)], (2, 5, 8, 11, 17, 33), limit=10))
    assert [sample[symbol(length)] for sample in samples] == [11, 17, 33]


def test_divisibility_is_kept():
    space, _, length = space_of(lambda x: x * 2 if x.shape[1] % 4 == 0 else x, tokens(3, 12))
    found = {sample[symbol(length)] for sample in space.samples([symbol(length)], range(2, 20), limit=50)}
    assert found == {4, 8, 12, 16}


def test_a_relation_of_two_sizes_is_kept():
    space, batch, length = space_of(lambda x: x * 2 if x.shape[1] > 2 * x.shape[0] else x, tokens(3, 13))
    samples = list(space.samples([symbol(batch), symbol(length)], (2, 3, 5, 8), limit=50))
    assert samples
    assert all(sample[symbol(length)] > 2 * sample[symbol(batch)] for sample in samples)


def test_distinct_values_come_first_and_the_limit_holds():
    space, batch, length = space_of(lambda x: x * 2, tokens(3, 13))
    samples = list(space.samples([symbol(batch), symbol(length)], (3, 4, 5), limit=6))
    assert len(samples) == 6
    assert all(len(set(sample.values())) == 2 for sample in samples)


def test_lower_and_upper_bounds_are_those_of_the_guards():
    space, _, length = space_of(lambda x: x * 2 if 6 < x.shape[1] <= 100 else x, tokens(3, 13))
    assert space.lower_bounds([symbol(length)]) == [7]
    assert space.upper_bound(length) == 100
    free, _, size = space_of(lambda x: x * 2, tokens(3, 13))
    assert free.upper_bound(size) is None


def test_a_specialised_graph_has_one_empty_assignment():
    space = SizeSpace([3, 4])
    assert list(space.samples([], (2, 3), limit=5)) == [{}]
    assert space.holds({})
    assert space.upper_bound(7) is None
    assert space.lower_bounds([]) == []


def test_sizes_are_bound_by_their_symbols():
    captured = capture(lambda x: torch.cat([x, x], 1)[:, 1:], tokens(3, 13))
    result = [tensor_value(n) for n in captured.graph.nodes if tensor_value(n) is not None][-1]
    (length,) = expression(result.shape[1]).free_symbols
    assert concrete(result.shape[1], {length: 7}) == 13
    assert bind(expression(5), {length: 7}) == 5


@pytest.mark.parametrize("length", [300, 1000])
def test_a_guard_beyond_the_usual_sizes_still_has_samples(length):
    space, _, size = space_of(lambda x: x * 2 if x.shape[1] >= 300 else x, tokens(2, length))
    bound = space.lower_bounds([symbol(size)])[0]
    assert list(space.samples([symbol(size)], (3, bound), limit=5)) == [{symbol(size): 300}]
