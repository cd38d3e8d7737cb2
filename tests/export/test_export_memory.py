"""An artifact fits its longest call: the lint knows every size, and sees what grows with the square of the length."""

import sys

import pytest

import msa_compile
from msa_compile.errors import ExportMemoryError

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import sparse, tokens  # noqa: E402
from models.zoo import ZOO  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from msa_compile.export.lint_memory import LARGEST, lint_live, lint_memory  # noqa: E402
from msa_compile.export.measure_onnx import UnknownSizeError, measure_onnx  # noqa: E402
from msa_compile.export.onnx_functions import (  # noqa: E402
    WORKSPACE,
    attention_function,
    attention_name,
    select_blocks_function,
)

LONG = 65536
HEADS, GROUPS, DIM = 32, 8, 128


def site_model(*, workspace=WORKSPACE, softcap=False, sinks=False, block_size=128, topk=16):
    floats = {"query": "bhtd", "index_query": "bgtd", "key": "bgnd", "value": "bgnd"} | (
        {"sinks": "h"} if sinks else {}
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims)) for name, dims in floats.items()]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, ["b"]) for name in ("query_start", "key_start")]
    inputs += [helper.make_tensor_value_info("key_visible", TensorProto.BOOL, ["b", "n"])]
    where = ["query_start", "key_start", "key_visible"]
    select = helper.make_node(
        "SelectBlocks", ["index_query", "key", *where], ["block_ids"], domain="msa",
        block_size=block_size, topk=topk, local_blocks=1, sink_blocks=0,
    )  # fmt: skip
    attend = helper.make_node(
        attention_name(softcap=softcap, sinks=sinks),
        ["query", "key", "value", "block_ids", *where, *["sinks"] * sinks], ["output"], domain="msa",
        block_size=block_size, scale=0.3, **({"softcap": 3.0} if softcap else {}),
    )  # fmt: skip
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, list("bhtd")),
        helper.make_tensor_value_info("block_ids", TensorProto.INT32, list("bgtk")),
    ]
    functions = [
        select_blocks_function(23, workspace=workspace),
        attention_function(23, softcap=softcap, sinks=sinks, workspace=workspace),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("msa", 1)]
    graph = helper.make_graph([select, attend], "site", inputs, outputs)
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def shapes(queries, keys, batch=1):
    return {
        "query": (batch, HEADS, queries, DIM),
        "index_query": (batch, GROUPS, queries, DIM),
        "key": (batch, GROUPS, keys, DIM),
        "value": (batch, GROUPS, keys, DIM),
        "sinks": (HEADS,),
        "query_start": (batch,),
        "key_start": (batch,),
        "key_visible": (batch, keys),
    }


@pytest.mark.parametrize("variant", [{}, {"softcap": True}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("queries", [LONG, 1], ids=["prefill", "decode"])
def test_attention_of_64k_tokens_and_8_groups_stays_below_the_bound(variant, queries):
    model = site_model(**variant)
    whole = measure_onnx(model, shapes(queries, LONG))
    half = measure_onnx(model, shapes(max(queries // 2, 1), LONG // 2))
    assert lint_memory("64K", whole, half, workspace=WORKSPACE) < LARGEST
    scores = [tensor for tensor in whole if tensor.operator == "MatMul" and tensor.shape[-1] == LONG]
    assert len(scores) == 2, "those of the selection and those of the attention were seen"
    assert max(tensor.elements for tensor in scores) <= WORKSPACE


@pytest.mark.parametrize("queries", [LONG, 1], ids=["prefill", "decode"])
def test_what_an_attention_of_64k_tokens_and_8_groups_needs_at_once_stays_below_2_gib(monkeypatch, queries):
    monkeypatch.setattr(sys.modules[__name__], "HEADS", 16)
    assert lint_live("64K", measure_onnx(site_model(), shapes(queries, LONG))) < LARGEST


def test_tensors_that_are_needed_at_once_are_added_and_others_are_not():
    # b = -a, c = -b, d = b + c, and e = c in another shape, which keeps c.
    steps = [("Neg", ["a"], "b"), ("Neg", ["b"], "c"), ("Reshape", ["c", "shape"], "e"), ("Add", ["b", "c"], "d"),
             ("Neg", ["d"], "f"), ("Neg", ["e"], "g")]  # fmt: skip
    nodes = [helper.make_node(kind, given, [made]) for kind, given, made in steps]
    info = helper.make_tensor_value_info
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [-1])
    results = [info("f", TensorProto.FLOAT, [256]), info("g", TensorProto.FLOAT, [256])]
    graph = helper.make_graph(nodes, "g", [info("a", TensorProto.FLOAT, [256])], results, [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    live = {made.name: made.live >> 10 for made in measure_onnx(model, {"a": (256,)})}
    assert live == {"b": 1, "c": 2, "d": 3}
    with pytest.raises(ExportMemoryError, match=r"at d \(Add\) the tensors that are needed at once"):
        lint_live("it", measure_onnx(model, {"a": (256,)}), bound=2048)


def test_selection_and_attention_that_are_not_chunked_fail():
    model = site_model(workspace=1 << 50)
    whole, half = (measure_onnx(model, shapes(length, length)) for length in (LONG, LONG // 2))
    with pytest.raises(ExportMemoryError, match=r"\[1, \d+, \d+, 65536\].*square of the length"):
        lint_memory("64K", whole, half, workspace=WORKSPACE)


def test_a_tensor_above_the_bound_fails_though_it_is_linear():
    model = site_model()
    whole, half = (measure_onnx(model, shapes(length, length)) for length in (LONG, LONG // 2))
    with pytest.raises(ExportMemoryError, match=r"the bound is 0\.1 GiB"):
        lint_memory("64K", whole, half, workspace=WORKSPACE, bound=1 << 27)


def test_a_size_that_only_the_data_know_is_not_guessed():
    node = helper.make_node("NonZero", ["x"], ["y"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1, "m"])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    with pytest.raises(UnknownSizeError, match="NonZero"):
        measure_onnx(model, {"x": (8,)})


def test_a_model_with_a_dense_site_is_not_exported_for_a_long_context(tmp_path):
    model = ZOO["llama"].build()
    sparse(model, {"input_ids": tokens(1, 23)}, exclude="model.layers.0.*")
    given = {"example_inputs": {"input_ids": tokens(2, 23)}, "max_length": LONG}
    with pytest.raises(ExportMemoryError, match="65536, 65536"):
        msa_compile.export(model, tmp_path / "m.onnx", **given)
    assert list(tmp_path.iterdir()) == []
    short = msa_compile.export(model, tmp_path / "m.onnx", **given | {"max_length": 64})
    assert [site.decision for site in short.sites] == ["dense", "sparse"]
    long = sparse(ZOO["llama"].build(), given["example_inputs"])
    assert msa_compile.export(long, tmp_path / "m.onnx", **given).largest < LARGEST
