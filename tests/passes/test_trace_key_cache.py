"""Every way of keeping keys is read, and what is not understood is refused."""

import pytest
import torch
from passes.tiny_attention import GROUPS, HEAD_DIM, capture, only, project, tokens, weights
from torch import Tensor
from torch.nn import functional as F

from msa_compile.passes.graph_facts import GraphFacts
from msa_compile.passes.placed import IndexRefused
from msa_compile.passes.trace_key_cache import KeyCache, trace_key_cache

ROOM = 24


def trace(keep, cache: Tensor, keys: int, length: int = 5) -> KeyCache:
    """Where the keys come from that `keep(cache, k)` returns, together with what else it returns."""

    def attend(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cache: Tensor, mask: Tensor) -> object:
        q, k, _ = project(x, wq, wk, wv)
        k, *rest = keep(cache, k)
        return F.scaled_dot_product_attention(q, k, k * 2, attn_mask=mask, enable_gqa=True), *rest

    captured = capture(
        attend, tokens(length=length), *weights(), cache, torch.ones(1, 1, length, keys, dtype=torch.bool), run=False
    )
    found = only(captured.found())
    assert found.proved is not None, found.detail
    return trace_key_cache(GraphFacts(captured.graph), found.proved.key, found.proved.attention.output, is_body=False)


def appended(cache: Tensor, k: Tensor):
    k = torch.cat([cache, k], 2)
    return k, k


def appended_by_tokens(cache: Tensor, k: Tensor):
    kept = torch.cat([cache, k.transpose(1, 2)], 1)
    return kept.transpose(1, 2), kept


@pytest.mark.parametrize("keep", [appended, appended_by_tokens])
def test_a_concatenation_has_its_past_and_its_output(keep):
    shape = (3, GROUPS, 7, HEAD_DIM) if keep is appended else (3, 7, GROUPS, HEAD_DIM)
    found = trace(keep, torch.randn(shape), keys=12)
    assert found.past is not None
    assert found.past.node.op == "placeholder"
    assert (found.past.axes, found.outputs) == ("BHTD" if keep is appended else "BTHD", (1,))


def rolled(cache: Tensor, k: Tensor):
    k = torch.cat([cache[:, 2:].transpose(1, 2), k], 2)
    return k, k[:, :, -6:].transpose(1, 2)


def test_what_a_rolling_cache_drops_is_read():
    found = trace(rolled, torch.randn(3, 9, GROUPS, HEAD_DIM), keys=12)
    assert found.past is not None
    assert (found.past.axes, found.outputs) == ("BTHD", (1,))
    assert [(cut.axis, cut.bounds[0]) for cut in (*found.past_cuts, *found.kept_cuts)] == [("T", 2), ("T", -6)]


def written_at(cache: Tensor, k: Tensor):
    cache[:, :, torch.arange(5) + 2] = k
    return (cache,)


def copied_at(cache: Tensor, k: Tensor):
    return (cache.index_copy_(2, torch.arange(5) + 2, k),)


def sliced(cache: Tensor, k: Tensor):
    cache[:, :, 2:7] = k
    return (cache[:, :, :7],)


def one_layer_of_several(cache: Tensor, k: Tensor):
    cache[1][:, :, 2:7] = k
    cache[2][:, :, 2:7] = k * 2
    return (cache[1],)


@pytest.mark.parametrize("keep", [written_at, copied_at, sliced])
def test_a_write_into_a_buffer_is_read(keep):
    found = trace(keep, torch.zeros(3, GROUPS, ROOM, HEAD_DIM), keys=7 if keep is sliced else ROOM)
    assert found.store is not None
    assert found.store.root.op == "placeholder"
    assert (found.store.entry.axes, found.store.read_axes) == ("BHTD", "BHTD")


def test_one_entry_of_a_buffer_of_all_layers_is_the_sites():
    found = trace(one_layer_of_several, torch.zeros(3, 3, GROUPS, ROOM, HEAD_DIM), keys=ROOM)
    assert found.store is not None
    assert found.store.kept == (1, 2, 3, 4)


def written_twice(cache: Tensor, k: Tensor):
    cache[:, :, 2:7] = k
    cache[:, :, 8:13] = k
    return (cache,)


def written_after_the_read(cache: Tensor, k: Tensor):
    cache[:, :, 2:7] = k
    read = cache.clone()
    cache.mul_(2)
    return (read,)


def appended_to_chosen_rows(cache: Tensor, k: Tensor):
    return (torch.cat([cache.flip(0), k], 2),)


def one_token_of_it(cache: Tensor, k: Tensor):
    cache[:, :, 3] = k[:, :, 0]
    return (cache,)


@pytest.mark.parametrize(
    ("keep", "keys"),
    [
        (written_twice, ROOM),
        (written_after_the_read, ROOM),
        (appended_to_chosen_rows, ROOM + 5),
        (one_token_of_it, ROOM),
    ],
)
def test_what_is_not_understood_is_refused(keep, keys):
    with pytest.raises(IndexRefused):
        trace(keep, torch.zeros(3, GROUPS, ROOM, HEAD_DIM), keys)
