"""The bodies of the two operators equal the ops that they stand for, in every argument, one chunk or many."""

import numpy as np
import pytest
import torch

import msa_compile.kernels.given_mask  # noqa: F401  (registers the msa ops)

pytest.importorskip("onnx", reason="the onnx extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from test_export_memory import site_model  # noqa: E402

CALLS = [
    # batch, Tq, Tk, key_start, end of padding
    (2, 37, 37, None, 0),
    (1, 1, 1, None, 0),
    (1, 16, 16, None, 0),
    (3, 1, 50, None, 0),
    (2, 9, 64, None, 0),
    (2, 80, 80, [3, 11], 0),
    (2, 81, 83, [0, 40], 5),
]


@pytest.mark.parametrize("workspace", [1 << 25, 4000], ids=["one_chunk", "chunks"])
@pytest.mark.parametrize("variant", ["plain", "softcap", "sinks"])
def test_the_bodies_equal_the_ops(variant, workspace):
    softcap, with_sinks = variant == "softcap", variant == "sinks"
    model = site_model(workspace=workspace, softcap=softcap, sinks=with_sinks, block_size=4, topk=5)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for batch, queries, keys, start, end in CALLS:
        q = torch.randn(batch, 8, queries, 16, generator=generator)
        k, v = torch.randn(2, batch, 2, keys, 16, generator=generator)
        sinks = torch.randn(8, generator=generator)
        index_query = q.unflatten(1, (2, 4)).mean(2)
        key_start = torch.tensor(start or [0] * batch)
        slots = torch.arange(keys)
        visible = (slots >= key_start[:, None]) & (slots < keys - end)
        query_start = torch.full((batch,), keys - queries)
        where = {"block_size": 4, "key_start": key_start, "mask": visible[:, None, None], "query_start": query_start}
        ids = torch.ops.msa.select_blocks(index_query, k, topk=5, **where)
        options = {"softcap": 3.0 if softcap else None, "sinks": sinks if with_sinks else None}
        expected = torch.ops.msa.block_sparse_attention(q, k, v, ids, scale=0.3, **options, **where)
        feeds = {"query": q, "index_query": index_query, "key": k, "value": v, "query_start": query_start}
        feeds |= {"key_start": key_start, "key_visible": visible} | ({"sinks": sinks} if with_sinks else {})
        output, found = session.run(["output", "block_ids"], {name: value.numpy() for name, value in feeds.items()})
        np.testing.assert_array_equal(found, ids.numpy())
        np.testing.assert_allclose(output, expected.numpy(), atol=2e-6)


def test_equal_scores_go_to_the_lower_blocks():
    model = site_model(block_size=4, topk=3)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ones = np.ones((1, 2, 40, 16), dtype=np.float32)
    where = {"query_start": np.zeros(1, dtype=np.int64), "key_start": np.zeros(1, dtype=np.int64)}
    feeds = {
        "query": np.ones((1, 8, 40, 16), dtype=np.float32),
        "index_query": ones,
        "key": ones,
        "value": ones,
        **where,
    }
    (found,) = session.run(["block_ids"], feeds | {"key_visible": np.ones((1, 40), dtype=bool)})
    assert found[0, 0, 39].tolist() == [0, 1, 9]
    assert found[0, 0, 3].tolist() == [0, -1, -1]
