"""Attention that is not causal grouped-query self-attention stays dense, for the right reason, and stays right."""

import pytest
import refused_models
import torch

import msa_compile
from msa_compile import MSAConfig
from msa_compile.errors import NothingToSparsifyError
from msa_compile.records import Reason

transformers = pytest.importorskip("transformers")

FULL = MSAConfig(block_size=4, topk_blocks=64, dense_below=0)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 128, **TOKENS,
}  # fmt: skip


def ids_of(batch=2, length=19):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padding(batch=2, length=19):
    return (torch.arange(length) >= torch.tensor([[0], [4]])[:batch]).long()


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, max_position_embeddings=128,
        decoder_start_token_id=2, forced_eos_token_id=None, **TOKENS,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def whisper():
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, num_mel_bins=8, max_source_positions=12,
        max_target_positions=40, decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def mla():
    config = transformers.DeepseekV3Config(
        **{**LLAMA, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval()


def bloom():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60, **TOKENS)
    return transformers.BloomForCausalLM(config).eval()


def mpt():
    config = transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, vocab_size=60, expansion_ratio=1)
    return transformers.MptForCausalLM(config).eval()


def doge():
    return transformers.DogeForCausalLM(transformers.DogeConfig(**LLAMA)).eval()


def bert():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=60, pad_token_id=0
    )
    return transformers.BertModel(config).eval()


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=4
    )
    return transformers.ViTModel(config).eval()


def mixtral():
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def inputs_of(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": ids_of(2, 9)}
    if name == "bart":
        return {"input_ids": ids_of(), "attention_mask": left_padding(), "decoder_input_ids": ids_of(2, 9)}
    if name == "mixtral":
        return {"input_ids": ids_of()}
    return {"input_ids": ids_of(), "attention_mask": left_padding()}


def reasons(report, part=""):
    return {site.reason for site in report.sites if part in site.name}


REFUSED = {
    "mla": (mla, {Reason.LATENT_ATTENTION}, 2),
    "bloom": (bloom, {Reason.ATTENTION_BIAS}, 2),
    "mpt": (mpt, {Reason.ATTENTION_BIAS}, 2),
    "doge": (doge, {Reason.DATA_DEPENDENT_MASK}, 2),
    "bert": (bert, {Reason.NOT_CAUSAL}, 2),
    "vit": (vit, {Reason.NOT_CAUSAL}, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_causal_self_attention_is_refused_whole(name, sparse_calls):
    make, expected, count = REFUSED[name]
    model, inputs = make(), inputs_of(name)
    with torch.no_grad():
        before = model(**inputs)[0]
    report = msa_compile.explain(model, config=FULL, **inputs)
    assert reasons(report) == expected, report
    assert len(report.sites) == count
    assert all(site.detail for site in report.sites)
    with pytest.raises(NothingToSparsifyError, match=next(iter(expected)).value):
        msa_compile.sparsify(model, FULL, example_inputs=inputs, inner="eager")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
        fast = torch.compile(model, backend="msa", options={"dense_below": 0, "block_size": 4, "inner": "eager"})
        torch.testing.assert_close(fast(**inputs)[0], before, atol=1e-5, rtol=1e-5)
    assert not sparse_calls


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attention_stays_dense_beside_sparse_self_attention(name, sparse_calls):
    model, inputs = {"bart": bart, "whisper": whisper}[name](), inputs_of(name)
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        report = msa_compile.explain(model, config=FULL, use_cache=False, **inputs)
        encoder = [site for site in report.sites if "encoder.layers" in site.name]
        decoder = [site for site in report.sites if "decoder.layers" in site.name]
        crossing = [site for site in decoder if "encoder_attn" in site.name]
        own = [site for site in decoder if "self_attn" in site.name]
        assert {site.reason for site in encoder} == {Reason.NOT_CAUSAL}
        assert {site.reason for site in crossing} == {Reason.CROSS_ATTENTION}
        assert {site.decision for site in own} == {"sparse"}
        assert len(crossing) == len(own) == 2
        msa_compile.sparsify(model, FULL, example_inputs={**inputs, "use_cache": False}, inner="eager")
        got = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, before, atol=1e-4, rtol=1e-4)
    assert len(sparse_calls) == 2


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_decode_step_never_makes_cross_attention_sparse(name, sparse_calls):
    """One query and no mask: nothing but where the keys come from tells cross-attention from self-attention."""
    model, inputs = {"bart": bart, "whisper": whisper}[name](), inputs_of(name)
    inputs.pop("decoder_input_ids")
    generation = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1, **inputs}
    expected = model.generate(**generation)
    msa_compile.sparsify(model, FULL, example_inputs=inputs_of(name), inner="eager")
    got = model.generate(**generation)
    assert torch.equal(got, expected)
    report = msa_compile.explain(model)
    crossing = [site for site in report.sites if "encoder_attn" in site.name]
    assert crossing
    assert {site.decision for site in crossing} == {"dense"}
    assert {site.decision for site in report.sites if "decoder.layers" in site.name and "self_attn" in site.name} == {
        "sparse"
    }
    # Two layers each step; a key length of the source would mean that a cross-attention ran sparse.
    assert len(sparse_calls) % 2 == 0
    assert len(sparse_calls) >= 10
    assert report.dense_calls == 0


HAND_WRITTEN = {
    "relative bias": (refused_models.RelativeAttention, Reason.ATTENTION_BIAS),
    "mask from activations": (refused_models.GatedMaskAttention, Reason.DATA_DEPENDENT_MASK),
    "alibi of one slope": (refused_models.AlibiAttention, Reason.ATTENTION_BIAS),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_hand_written_bias_or_gate_is_refused(name, sparse_calls):
    attention, reason = HAND_WRITTEN[name]
    model = refused_models.Decoder(attention).eval()
    report = msa_compile.explain(model, ids_of(), config=FULL)
    assert [(site.name, site.reason) for site in report.sites] == [("layers.0", reason), ("layers.1", reason)]
    with pytest.raises(NothingToSparsifyError, match=reason.value):
        msa_compile.sparsify(model, FULL, example_inputs=ids_of(), inner="eager")
    fast = torch.compile(model, backend="msa", options={"dense_below": 0, "block_size": 4, "inner": "eager"})
    torch.testing.assert_close(fast(ids_of()), model(ids_of()), atol=1e-5, rtol=1e-5)
    assert not sparse_calls


def test_routers_are_no_attention():
    report = msa_compile.explain(mixtral(), config=FULL, **inputs_of("mixtral"))
    assert [site.name for site in report.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {site.decision for site in report.sites} == {"sparse"}


@pytest.mark.parametrize("make", [refused_models.Pooled, refused_models.DotPooled])
def test_attention_pooling_stays_dense_beside_sparse_attention(make, sparse_calls):
    model = make().eval()
    expected = model(ids_of())
    report = msa_compile.explain(model, ids_of(), config=FULL)
    assert [site.name for site in report.sparse] == ["decoder.layers.0", "decoder.layers.1"]
    msa_compile.sparsify(model, FULL, example_inputs=ids_of(), inner="eager")
    torch.testing.assert_close(model(ids_of()), expected, atol=1e-4, rtol=1e-4)
    assert len(sparse_calls) == 2


def test_strict_names_the_refused_sites():
    config = MSAConfig(block_size=4, topk_blocks=64, dense_below=0, strict=True)
    with pytest.raises(msa_compile.errors.SiteRefusedError, match=r"encoder_attn.*cross_attention"):
        msa_compile.sparsify(bart(), config, example_inputs=inputs_of("bart"), inner="eager")
