"""Bounds that are found for a mask show what the mask shows; the masks that models make have them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.given_mask import mask_positions
from msa_compile.kernels.visibility import find_visibility

NOTHING = dict.fromkeys(("query_start", "key_start", "key_end", "document_start"))


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries


def shown(batch: int, queries: int, keys: int, **bounds: object) -> torch.Tensor:
    seen = find_visibility(query_length=queries, key_length=keys, device=torch.device("cpu"), **bounds)
    return seen.of_all_slots().expand(batch, 1, queries, keys)


def closed(mask: torch.Tensor | None, batch: int, queries: int, keys: int, **bounds: object):
    given_bounds = {**NOTHING, "is_causal": True, **bounds, "mask": mask}
    sizes = {"batch": batch, "query_length": queries, "key_length": keys, "device": torch.device("cpu")}
    return find_closed_form(**sizes, **given_bounds)


def padding(side: str, keys: int) -> torch.Tensor:
    widths = torch.tensor([[0], [3], [keys - 1]])
    return torch.arange(keys) >= widths if side == "left" else torch.arange(keys) < keys - widths


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", [9, 1])
def test_the_row_of_a_padding_mask_has_bounds(side, queries):
    mask = padding(side, 9)[:, None, None, :]
    starts = {"key_start": mask.int().argmax(-1).flatten()}
    found = closed(mask, 3, queries, 9, **starts)
    assert found is not None
    assert torch.equal(shown(3, queries, 9, **found), shown(3, queries, 9, **starts, mask=mask))


def given_masks(keys: int) -> dict[str, torch.Tensor]:
    document = torch.arange(keys) // 4
    return {
        "causal": causal(keys, keys)[None, None],
        "left padding": causal(keys, keys) & padding("left", keys)[:, None, None, :],
        "right padding": causal(keys, keys) & padding("right", keys)[:, None, None, :],
        "packed": (causal(keys, keys) & (document[:, None] == document))[None, None],
        "static cache": (torch.arange(keys) <= torch.arange(5)[:, None] + 3)[None, None],
        "decode in a static cache": (torch.arange(keys) <= 6)[None, None, None],
        "prefix": (causal(keys, keys) | (torch.arange(keys) < 5))[None, None],
        "window": (causal(keys, keys) & ~causal(keys, keys).tril(-4))[None, None],
        "holes": (causal(keys, keys) & (torch.arange(keys) % 3 != 1))[None, None],
        "a bidirectional call": torch.ones(1, 1, keys, keys, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", given_masks(14))
def test_what_a_given_mask_shows_is_said_or_refused(name):
    mask = given_masks(14)[name]
    batch, queries = mask.shape[0], mask.shape[2]
    query_start, _, document_start = mask_positions(mask, torch.zeros(batch, 2, queries, 1))
    where = {"query_start": query_start, "document_start": document_start}
    found = closed(mask, batch, queries, 14, **where, is_causal=False)
    assert (found is None) == (name in ("prefix", "holes", "a bidirectional call"))
    if found is not None:
        assert torch.equal(shown(batch, queries, 14, **found), mask.expand(batch, 1, queries, 14))


def test_heads_that_differ_and_open_calls_have_none():
    mask = causal(6, 6).expand(1, 2, 6, 6)
    assert closed(mask, 1, 6, 6) is None
    assert closed(None, 1, 6, 6, is_causal=False) is None
    assert closed(None, 1, 6, 6) == NOTHING


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_bounds_show_what_the_arguments_show(data):
    draw = data.draw
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    queries = draw(st.integers(1, keys))
    slots = st.integers(0, keys)
    runs = [[sorted((draw(slots), draw(slots))) for _ in range(queries)] for _ in range(batch)]
    mask = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row, of_row in enumerate(runs):
        for query, (start, stop) in enumerate(of_row):
            mask[row, 0, query, start:stop] = True
    if draw(st.booleans()):
        mask = mask[:, :, :1]
    possible = {
        "query_start": torch.tensor([draw(slots) for _ in range(batch)]),
        "key_start": torch.tensor([draw(slots) for _ in range(batch)]),
        "key_end": torch.tensor([draw(slots) for _ in range(batch)]),
        "document_start": torch.tensor([[draw(slots) for _ in range(queries)] for _ in range(batch)]),
        "is_causal": False,
    }
    where = {name: possible[name] for name in draw(st.sets(st.sampled_from(sorted(possible))))}
    found = closed(mask, batch, queries, keys, **where)
    if found is None:
        return
    seen = find_visibility(query_length=queries, key_length=keys, device=torch.device("cpu"), **where)
    assert torch.equal(shown(batch, queries, keys, **found), shown(batch, queries, keys, **where, mask=mask))
    after = find_visibility(query_length=queries, key_length=keys, device=torch.device("cpu"), **found)
    sees = shown(batch, queries, keys, **found)[:, 0].any(-1)
    for one, other in ((seen.position, after.position), (seen.anchor, after.anchor)):
        assert torch.equal(one.expand(batch, -1)[sees], other.expand(batch, -1)[sees])
