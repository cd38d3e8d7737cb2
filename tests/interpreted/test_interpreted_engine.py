"""The launches of an engine that needs no Python, one after the other as its plugins run; the reference judges."""

from typing import Any

import interpreter  # noqa: F401  # skips this file in other processes
import pytest
import torch

pytest.importorskip("onnx", reason="the onnx extra is not installed")
from msa_compile.export.engine import triton_entries
from msa_compile.export.engine.entries import entry_of, lists_of
from msa_compile.export.engine.plugins import PLUGINS
from msa_compile.kernels.block_sparse_attention import reference as attention_reference
from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.select_blocks import reference as selection_reference

BLOCK_SIZE, TOPK = 8, 3


def run(name: str, tensors: dict[str, Any], numbers: dict[str, Any]) -> list[torch.Tensor]:
    """What a plugin writes."""
    plugin = PLUGINS[name]
    given = [tensors[tensor] for tensor in plugin.tensors]
    chosen = {number: numbers[number] for number in plugin.numbers}
    shapes = {tensor: tuple(tensors[tensor].shape) for tensor in plugin.tensors}
    entry = entry_of(plugin, shapes, chosen, 4, CHIPS[90])
    kinds = {"int32": torch.int32, "float32": torch.float32, "query": tensors["query"].dtype}
    outputs = [torch.empty(out.shape, dtype=kinds[out.dtype]) for out in plugin.outputs(shapes, chosen)]
    kernel = getattr(triton_entries, entry.kernel)
    constants = {**entry.constants, **entry.tile.sizes}
    passed = iter([*given, *outputs])
    arguments = {each: constants[each] if each in constants else next(passed) for each in kernel.arg_names}
    kernel[entry.grid](**{k: v.view(torch.uint8) if k == "key_visible" else v for k, v in arguments.items()})
    return outputs


@pytest.mark.parametrize(
    ("queries", "keys", "is_padded", "variant"),
    [(21, 21, False, ""), (1, 45, True, "WithSinks"), (19, 45, True, "SoftcappedWithSinks")],
    ids=["prompt", "step", "chunk"],
)
def test_the_launches_of_selection_and_attention_give_what_the_ops_give(
    queries: int, keys: int, is_padded: bool, variant: str
) -> None:
    torch.manual_seed(0)
    batch, heads, groups, dim = 2, 4, 2, 16
    query, key, value = (torch.randn(batch, h, t, dim) for h, t in ((heads, queries), (groups, keys), (groups, keys)))
    index_query = query.unflatten(1, (groups, -1)).mean(2)
    starts = torch.tensor([keys - queries, max(keys - queries - 3, 0)])
    first = torch.tensor([0, 2]) if is_padded else torch.zeros(2, dtype=torch.int64)
    visible = (torch.arange(keys) >= first[:, None]) if is_padded else torch.ones(batch, 1, dtype=torch.bool)
    sinks = torch.randn(heads)
    queries_a_tile, list_size = lists_of(
        {"heads": heads, "groups": groups, "head_dim": dim, "block_size": BLOCK_SIZE}, TOPK, 4, CHIPS[90]
    )
    numbers = {
        "block_size": BLOCK_SIZE,
        "topk": TOPK,
        "local_blocks": 1,
        "sink_blocks": 1,
        "groups": groups,
        "key_heads": groups,
        "heads": heads,
        "head_dim": dim,
        "most_blocks": 8,
        "scale": 0.3,
        "softcap": 2.0,
        "queries_a_tile": queries_a_tile,
        "list_size": list_size,
        "is_padded": int(is_padded),
        "is_positioned": 1,
    }
    tensors: dict[str, Any] = {"query": query, "key": key, "value": value, "sinks": sinks}
    tensors |= {"index_query": index_query, "index_key": key, "key_visible": visible}
    tensors |= {"query_start": starts, "key_start": first, "lengths": torch.tensor([queries, keys])}
    bounds: dict[str, Any] = {"query_start": starts}
    if is_padded:
        bounds |= {"key_start": first, "mask": visible[:, None, None]}

    [tensors["scores"]] = run("ScoreBlocks", tensors, numbers)
    [tensors["block_ids"]] = run("ChooseBlocks", tensors, numbers)
    expected = selection_reference.select_blocks(
        index_query.double(), key.double(), block_size=BLOCK_SIZE, topk=TOPK, sink_blocks=1, **bounds
    )
    assert torch.equal(tensors["block_ids"], expected)

    tensors |= dict(zip(("starts", "members", "counts"), run("ListBlocks", tensors, numbers), strict=True))
    [output] = run("AttendBlocks" + variant, tensors, numbers)
    options = {"sinks": sinks.double()} if "WithSinks" in variant else {}
    options |= {"softcap": 2.0} if "Softcapped" in variant else {}
    exact = attention_reference.block_sparse_attention(
        query.double(), key.double(), value.double(), expected, block_size=BLOCK_SIZE, scale=0.3, **options, **bounds
    )
    assert (output.double() - exact).abs().max() <= 2e-6
