"""Law 7 for what outlives a call: copies, pickles, checkpoints, replicas."""

import copy
import io

import pytest
import torch
import transformers
from torch import nn

import msa_compile
from msa_compile import MSAConfig
from msa_compile.errors import DataParallelError, NotSparseError
from runtime.tiny import LAYERS, OpCount, llama, small, sparse, tokens


def qwen3() -> transformers.Qwen3ForCausalLM:
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=16, vocab_size=50, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def test_a_deep_copy_is_sparse_and_uses_its_own_weights(ops: OpCount):
    model, ids = sparse(small()), tokens()
    want = model(ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ops.take()
    got = twin(ids)
    assert (ops.take(), msa_compile.explain(twin).dense_calls) == (LAYERS, 0)
    assert torch.equal(got, want)
    assert not model(ids).any()
    msa_compile.unsparsify(twin)
    assert torch.equal(twin(ids), small()(ids))
    assert msa_compile.explain(model).sparsified


def test_a_model_saved_whole_is_sparse_after_loading(ops: OpCount):
    model, ids = sparse(small()), tokens()
    want = model(ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ops.take()
    assert torch.equal(loaded(ids), want)
    assert (ops.take(), msa_compile.explain(loaded).dense_calls) == (LAYERS, 0)
    assert loaded.forward.module is loaded
    assert msa_compile.explain(loaded).config == msa_compile.explain(model).config


def test_a_copy_made_inside_dense_is_a_plain_model(ops: OpCount):
    model, ids = sparse(small()), tokens()
    with msa_compile.dense(model):
        twin = copy.deepcopy(model)
    assert twin.__dict__.keys() == small().__dict__.keys()
    assert torch.equal(twin(ids), small()(ids))
    assert ops.take() == 0
    model(ids)
    assert ops.take() == LAYERS


def test_state_dict_is_unchanged_and_loads_strictly(ops: OpCount):
    model = sparse(small())
    plain = small(seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    ids = tokens()
    assert torch.equal(model(ids), sparse(small(seed=1))(ids))
    assert ops.take() == 2 * LAYERS


def test_save_pretrained_holds_a_plain_dense_model(sparse_llama, tmp_path, ops: OpCount):
    sparse_llama.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("msa" in path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    assert not msa_compile.runtime.has_traces(loaded)
    ids = tokens()
    assert torch.equal(loaded(ids).logits, llama()(ids).logits)
    assert ops.take() == 0
    with pytest.raises(NotSparseError):
        msa_compile.unsparsify(loaded)


def test_a_checkpoint_with_index_branches_says_that_they_were_left_out(tmp_path, caplog):
    pytest.importorskip("safetensors")
    learned = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned")
    model = sparse(qwen3(), learned)
    for layer in model.model.layers:
        for weight in layer.self_attn.indexer.weights():
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path)
    msa_compile.save(model, tmp_path / "adapter")
    loaded = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    assert not msa_compile.runtime.has_traces(loaded)
    caplog.clear()
    sparse(loaded)
    [said] = [entry.message for entry in caplog.records if "index branches" in entry.message]
    assert all(part in said for part in (str(tmp_path), "of 2 sites", "msa_compile.load", "msa_compile.dense"))
    caplog.clear()
    back = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    msa_compile.load(back, tmp_path / "adapter")
    assert not [entry for entry in caplog.records if "loaded without them" in entry.message]
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with msa_compile.dense(model):
        model.save_pretrained(tmp_path / "dense")
    caplog.clear()
    sparse(transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "dense").eval())
    assert not [entry for entry in caplog.records if "index branches" in entry.message]


def test_data_parallel_replication_is_refused():
    model = sparse(small())
    with pytest.raises(DataParallelError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()
    wrapped = nn.DataParallel(small())
    with pytest.raises(DataParallelError):
        msa_compile.sparsify(wrapped)
    replica = small()._replicate_for_data_parallel()
    with pytest.raises(DataParallelError):
        msa_compile.sparsify(replica)
