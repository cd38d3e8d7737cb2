"""A learned indexer goes into the file: its branches are in the graph, its keys beside the key cache."""

import pytest
import torch

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import BUDGET, EXACT, MAX_LENGTH, difference, load, sparse, tokens
from models.learned import sharpen
from models.zoo import ZOO

import msa_compile
from msa_compile.export.thread_index_keys import name_index_keys

STEPS = 32
PROMPT = 4 * BUDGET - 3
PIECES = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]


@pytest.mark.slow
def test_whole_prompts_select_by_the_index_branch(artifact_of):
    artifact = artifact_of("llama", indexer="learned")
    assert [site.indexer for site in artifact.result.sites] == ["learned", "learned"]
    assert [port.name for port in artifact.result.inputs] == ["input_ids"]
    for length in (1, BUDGET + 1, 4 * BUDGET + 3):
        ids = tokens(2, length, seed=length)
        expected = artifact.entry.calls.whole(artifact.model, ids)
        assert difference(expected, artifact(input_ids=ids)["logits"]) < EXACT, length
    by_keys = artifact_of("llama")(input_ids=ids)["logits"]
    assert difference(expected, by_keys) > 0.1, "the index branch chooses other blocks than the keys do"


@pytest.mark.parametrize(("name", "cache"), [("llama", "explicit"), ("qwen3", "static")])
def test_index_keys_go_through_the_caches_of_32_steps(artifact_of, name, cache):
    artifact = artifact_of(name, cache, indexer="learned")
    ids = tokens(2, PROMPT + STEPS)
    feed = artifact.entry.calls.start(artifact.model, "static" if cache == "static" else "dynamic", 2, MAX_LENGTH)
    state = artifact.empty(2, MAX_LENGTH if cache == "static" else 0)
    for start, end in PIECES:
        piece = ids[:, start:end].contiguous()
        where = {"position": torch.full((2,), start)} if cache == "static" else {}
        out = artifact(input_ids=piece, **where, **state)
        state = artifact.state(out)
        assert difference(feed(piece)[:, -1:], out["logits"]) < EXACT, start
    ports = {port.name: port.shape for port in (*artifact.result.inputs, *artifact.result.outputs)}
    past, present = (MAX_LENGTH, MAX_LENGTH) if cache == "static" else ("past", "past + length")
    width = ports["past_key_values.0.key"][-1]
    for layer in range(2):
        assert ports[f"past_key_values.{layer}.index_key"] == ("batch", 1, past, width)
        assert ports[f"present.{layer}.index_key"] == ("batch", 1, present, width)


@pytest.mark.slow
def test_index_keys_stand_beside_a_cache_that_is_an_argument_of_the_model(tmp_path):
    past = [(torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)) for _ in range(2)]
    given = (tokens(2, 7), torch.ones(2, 18, dtype=torch.long), past)
    model = sparse(ZOO["cat"].build(), given, indexer="learned")
    sharpen(model)
    batch, new, before = (
        torch.export.Dim(name, min=0, max=most) for name, most in (("batch", 8), ("length", 60), ("before", 60))
    )
    total = torch.export.Dim("total", min=4, max=120)
    shapes = ({0: batch, 1: new}, {0: batch, 1: total}, [({0: batch, 2: before},) * 2] * 2)
    result = msa_compile.export(model, tmp_path / "m.onnx", example_inputs=given, dynamic_shapes=shapes)
    keys = [port.name for port in result.inputs if port.name.endswith("index_key")]
    assert [port.shape for port in result.inputs if port.name in keys] == [("batch", 1, "before", 8)] * 2
    session = load(result.path)
    names = [port.name for port in result.outputs]
    own = [port.name for port in result.inputs if port.name not in ("ids", "keep")]
    ids, empty = tokens(1, 60), torch.zeros(1, 2, 0, 8).numpy()
    feeds = dict.fromkeys(own, empty) | dict.fromkeys(keys, empty[:, :1])
    for start, end in ((0, 40), *((at, at + 1) for at in range(40, 60))):
        keep = torch.ones(1, end, dtype=torch.long)
        piece = ids[:, start:end].contiguous()
        found = dict(zip(names, session.run(names, feeds | {"ids": piece.numpy(), "keep": keep.numpy()}), strict=True))
        logits, *_ = found.values()
        assert (
            difference(model(ids[:, :end], keep, [(torch.zeros(1, 2, 0, 8),) * 2] * 2)[0][:, -1:], logits[:, -1:])
            < EXACT
        )
        feeds = dict(zip(own, list(found.values())[1:], strict=True))


def test_index_keys_are_named_after_the_keys_that_they_stand_beside():
    assert name_index_keys("present.3.key") == "present.3.index_key"
    assert name_index_keys("past_0_0") == "past_0_0_index_key"
