"""The ONNX file computes what the sparsified model computes, in onnxruntime, which knows nothing of this package."""

import dataclasses

import pytest
import torch

import msa_compile
from msa_compile.errors import CaptureError
from msa_compile.export import write_onnx

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import BLOCK_SIZE, BUDGET, EXACT, difference, load, sparse, tokens  # noqa: E402
from models.zoo import ZOO  # noqa: E402

LENGTHS = (1, 2, BLOCK_SIZE, BUDGET - 1, BUDGET, BUDGET + 1, BUDGET + BLOCK_SIZE, 4 * BUDGET, 4 * BUDGET + 3)


@pytest.mark.parametrize("name", ["llama", "nanogpt"])
def test_the_file_equals_the_model_over_batch_and_length(artifact_of, name):
    artifact = artifact_of(name)
    (given,) = (port.name for port in artifact.result.inputs)
    (returned,) = (port.name for port in artifact.result.outputs)
    # nanogpt has a table of 64 positions.
    for length in LENGTHS if name != "nanogpt" else [*LENGTHS[:-2], 3 * BUDGET, 63]:
        ids = tokens(1 + length % 3, length, seed=length)
        expected = artifact.entry.calls.whole(artifact.model, ids)
        assert difference(expected, artifact(**{given: ids})[returned]) < EXACT, length


def test_the_budget_is_what_makes_the_file_differ_from_the_dense_model(artifact_of):
    artifact = artifact_of("llama")
    ids = tokens(1, 4 * BUDGET)
    with msa_compile.dense(artifact.model):
        dense = artifact.model(ids).logits
    found = artifact(input_ids=ids)["logits"]
    assert difference(dense[:, :BUDGET], found[:, :BUDGET]) < EXACT
    assert difference(dense, found) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(artifact_of, side):
    artifact = artifact_of("llama", padded=True)
    length, short = 4 * BUDGET, 3 * BUDGET + 5
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    hole = slice(0, length - short) if side == "left" else slice(short, length)
    mask[1, hole] = 0
    found = artifact(input_ids=ids, attention_mask=mask)["logits"]
    alone = artifact(input_ids=ids[1:, mask[1].bool()], attention_mask=mask[1:, mask[1].bool()])["logits"]
    assert difference(alone[0], found[1, mask[1].bool()]) < EXACT
    expected = artifact.entry.calls.whole(artifact.model, ids, mask)
    assert difference(expected[mask.bool()], found[mask.bool()]) < EXACT


def test_every_site_is_two_nodes_with_a_body_and_the_namespace_of_a_plugin(artifact_of):
    artifact = artifact_of("llama")
    model = onnx.load(artifact.result.path)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.domain == "msa"]
    assert [node.op_type for node in nodes] == ["SelectBlocks", "BlockSparseAttention"] * 2
    for node in nodes:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        assert attributes["plugin_namespace"] == b"msa"
        assert attributes["block_size"] == BLOCK_SIZE
    assert {function.name for function in model.functions} == {"SelectBlocks", "BlockSparseAttention"}
    bodies = [node.domain for function in model.functions for node in function.node]
    assert set(bodies) == {""}, "a body is made of standard operators"
    assert not [node for node in model.graph.node if node.op_type in ("Attention", "Softmax")], "no dense attention"


def test_the_result_says_what_was_written_and_checked(artifact_of):
    result = artifact_of("llama").result
    assert [str(port) for port in result.inputs] == ["input_ids: int64[batch, length]"]
    assert [str(port) for port in result.outputs] == ["logits: float32[batch, length, 100]"]
    assert result.size == sum(file.stat().st_size for file in result.files) > 0
    assert [site.name for site in result.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert result.opset == 23
    printed = str(result)
    assert "2 sparse and 0 dense sites" in printed
    assert "checked: onnx.checker" in printed
    assert "equals PyTorch at batch 2, length 23" in printed
    assert "NOT checked: TensorRT" in printed


def test_big_weights_lie_in_a_file_beside_the_model(artifact_of, tmp_path, monkeypatch):
    monkeypatch.setattr(write_onnx, "EXTERNAL_ABOVE", 0)
    artifact = artifact_of("llama")
    ids = tokens(2, 23)
    result = msa_compile.export(artifact.model, tmp_path / "big.onnx", example_inputs={"input_ids": ids})
    assert [file.name for file in result.files] == ["big.onnx", "big.onnx.data"]
    assert sorted(tmp_path.iterdir()) == list(result.files)
    assert result.files[0].stat().st_size < result.files[1].stat().st_size
    moved = dataclasses.replace(artifact, session=load(result.path))
    assert difference(artifact(input_ids=ids)["logits"], moved(input_ids=ids)["logits"]) == 0


def test_a_softcap_is_in_the_file_beside_a_window_that_stays_dense(artifact_of):
    artifact = artifact_of("gemma2")
    kinds = [node.op_type for node in onnx.load(artifact.result.path).graph.node if node.domain == "msa"]
    assert kinds == ["SelectBlocks", "BlockSparseAttentionSoftcapped"]
    assert [site.decision for site in artifact.result.sites] == ["dense", "sparse"]
    for length in (3, 4 * BUDGET + 3):
        ids = tokens(2, length, seed=length)
        assert difference(artifact.entry.calls.whole(artifact.model, ids), artifact(input_ids=ids)["logits"]) < EXACT


def test_exporting_leaves_the_model_sparse_and_as_it_was(tmp_path):
    model = sparse(ZOO["nanogpt"].build(), (tokens(2, 23),))
    before = model(tokens(1, 50))
    msa_compile.export(model, tmp_path / "m.onnx", example_inputs=tokens(2, 23), max_length=64)
    assert difference(before, model(tokens(1, 50))) == 0
    assert msa_compile.explain(model).dense_calls == 0


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "static"])
def test_a_model_in_half_precision_runs_in_onnxruntime(tmp_path, cache):
    ids = {"input_ids": tokens(2, 23)}
    model = sparse(ZOO["qwen3"].build().half())
    result = msa_compile.export(model, tmp_path / "m.onnx", example_inputs=ids, cache=cache, max_length=128)
    assert {port.dtype for port in result.outputs} == {"float16"}
    assert "onnxruntime 1" in str(result)
    assert "equals PyTorch at batch 2, length 23" in str(result)


@pytest.mark.slow
def test_a_model_in_bfloat16_is_written_and_the_result_says_that_onnxruntime_did_not_check_it(tmp_path):
    model = sparse(ZOO["llama"].build().bfloat16())
    result = msa_compile.export(model, tmp_path / "m.onnx", example_inputs={"input_ids": tokens(2, 23)}, max_length=64)
    assert any("does not load it on a CPU" in said and "MatMul" in said for said in result.not_checked)
    assert not any("equals PyTorch" in said for said in result.checks)


@pytest.mark.slow
def test_experts_and_sinks_are_in_the_file_once_the_experts_are_not_an_operator_of_their_library(tmp_path):
    model, ids = ZOO["gpt_oss"].build(), {"input_ids": tokens(2, 23)}
    with pytest.raises(CaptureError, match="grouped_mm"):
        msa_compile.export(sparse(model), tmp_path / "m.onnx", example_inputs=ids, max_length=128)
    model.set_experts_implementation("batched_mm")
    result = msa_compile.export(model, tmp_path / "m.onnx", example_inputs=ids, max_length=128)
    kinds = [node.op_type for node in onnx.load(result.path).graph.node if node.domain == "msa"]
    assert kinds == ["SelectBlocks", "BlockSparseAttentionWithSinks"]
    assert "equals PyTorch at batch 2, length 23" in str(result)
