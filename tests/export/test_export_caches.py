"""A prompt and 32 tokens after it go through the caches of the file, one call each, as they go through the model's."""

import pytest
import torch

import msa_compile
from msa_compile.errors import ExampleInputsError, ExportCacheError

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import BUDGET, EXACT, MAX_LENGTH, difference, sparse, tokens  # noqa: E402
from models.zoo import ZOO  # noqa: E402

STEPS = 32
PROMPT = 4 * BUDGET - 3  # the steps cross block edges


def test_an_explicit_cache_decodes_as_the_model_does(artifact_of):
    artifact = artifact_of("llama", "explicit")
    ids = tokens(2, PROMPT + STEPS)
    feed = artifact.entry.calls.start(artifact.model, "dynamic", 2, PROMPT + STEPS)
    state = artifact.empty(2, 0)
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        piece = ids[:, start:end].contiguous()
        out = artifact(input_ids=piece, **state)
        state = artifact.state(out)
        assert difference(feed(piece)[:, -1:], out["logits"]) < EXACT, start
    assert all(value.shape[2] == PROMPT + STEPS for value in state.values())


def test_an_explicit_cache_decodes_rows_with_padding_on_the_left(artifact_of):
    artifact = artifact_of("llama", "explicit", padded=True)
    ids = tokens(2, PROMPT + 4)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    state = artifact.empty(2, 0)
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + 4))]:
        out = artifact(input_ids=ids[:, start:end].contiguous(), attention_mask=mask[:, :end].contiguous(), **state)
        state = artifact.state(out)
        expected = artifact.entry.calls.whole(artifact.model, ids[:, :end], mask[:, :end])
        assert difference(expected[:, -1:], out["logits"]) < EXACT, start


def test_a_static_cache_decodes_as_the_model_does(artifact_of):
    artifact = artifact_of("qwen3", "static")
    ids = tokens(2, PROMPT + STEPS)
    feed = artifact.entry.calls.start(artifact.model, "static", 2, MAX_LENGTH)
    state = artifact.empty(2, MAX_LENGTH)
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        piece = ids[:, start:end].contiguous()
        out = artifact(input_ids=piece, position=torch.full((2,), start), **state)
        state = artifact.state(out)
        assert difference(feed(piece)[:, -1:], out["logits"]) < EXACT, start


def test_rows_of_a_static_cache_stand_at_positions_of_their_own(artifact_of):
    artifact = artifact_of("qwen3", "static")
    ids = tokens(2, PROMPT + 5)
    starts = [PROMPT, BUDGET + 2]
    rows = [
        artifact(input_ids=ids[row : row + 1, :start], position=torch.zeros(1, dtype=torch.long),
                 **artifact.empty(1, MAX_LENGTH))
        for row, start in enumerate(starts)
    ]  # fmt: skip
    state = artifact.state({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    position = torch.tensor(starts)
    for step in range(5):
        fresh = ids[torch.arange(2), position][:, None]
        out = artifact(input_ids=fresh, position=position, **state)
        state, position = artifact.state(out), position + 1
        for row in range(2):
            alone = artifact.entry.calls.whole(artifact.model, ids[row : row + 1, : int(position[row])])
            assert difference(alone[:, -1], out["logits"][row]) < EXACT, (step, row)


def test_a_static_cache_is_written_by_one_operator_and_goes_in_and_out_unchanged_in_shape(artifact_of):
    artifact = artifact_of("qwen3", "static")
    assert artifact.result.opset == 24
    kinds = [node.op_type for node in onnx.load(artifact.result.path).graph.node]
    assert kinds.count("TensorScatter") == 4
    assert kinds.count("SelectBlocks") == 2
    ports = {port.name: port.shape for port in (*artifact.result.inputs, *artifact.result.outputs)}
    for layer in range(2):
        for state in ("key", "value"):
            shape = ("batch", 2, MAX_LENGTH, 16)
            assert ports[f"past_key_values.{layer}.{state}"] == ports[f"present.{layer}.{state}"] == shape


def test_a_hand_written_cache_goes_in_and_out_as_the_model_has_it(tmp_path):
    model = ZOO["cat"].build()
    ids, past = tokens(2, 7), [(torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)) for _ in range(2)]
    given = (ids, torch.ones(2, 18, dtype=torch.long), past)
    sparse(model, given)
    batch, new, before = (
        torch.export.Dim(name, min=0, max=most) for name, most in (("batch", 8), ("length", 30), ("before", 30))
    )
    total = torch.export.Dim("total", min=4, max=60)
    shapes = ({0: batch, 1: new}, {0: batch, 1: total}, [({0: batch, 2: before},) * 2] * 2)
    with pytest.raises(ExportCacheError, match="cache='none'"):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=given, cache="explicit")
    result = msa_compile.export(model, tmp_path / "m.onnx", example_inputs=given, dynamic_shapes=shapes)
    assert [port.name for port in result.inputs][:2] == ["ids", "keep"]
    assert len(result.inputs) == 6
    assert len(result.outputs) == 5
    assert "equals PyTorch" in str(result)


def test_what_a_cache_does_not_go_with_is_an_error(artifact_of, tmp_path):
    windowed = artifact_of("gemma2").model
    with pytest.raises(ExportCacheError, match="sliding window"):
        msa_compile.export(windowed, tmp_path / "m.onnx", example_inputs={"input_ids": tokens(1, 9)}, cache="static")
    padded = {"input_ids": tokens(1, 9), "attention_mask": torch.tensor([[0, *[1] * 8]])}
    plain = artifact_of("llama").model
    with pytest.raises(ExampleInputsError, match="a position for each row"):
        msa_compile.export(plain, tmp_path / "m.onnx", example_inputs=padded, cache="static")
    assert list(tmp_path.iterdir()) == []
