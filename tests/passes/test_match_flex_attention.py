"""`flex_attention` is read by what its mask hides; whatever else it may do keeps the site dense and right."""

import warnings

import pytest
import torch
from tiny_attention import HEAD_DIM, SIZES, capture, only, project, repeat_kv, sparse, tokens, weights
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import msa_compile
from msa_compile import MSAConfig, _compat
from msa_compile.passes.pipeline import run_passes
from msa_compile.passes.spell_block_masks import MASK_NAME
from msa_compile.records import Reason

W = weights()


@pytest.fixture(autouse=True)
def _unfused_flex_attention_may_run():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q >= k) & (q - k < 5)


def everything(b, h, q, k):
    return q + k >= 0


def per_head(b, h, q, k):
    return (q >= k) & (q - k < 3 + h)


def made_for(x, mask_mod, batched=False, heads=None):
    return create_block_mask(mask_mod, x.shape[0] if batched else None, heads, x.shape[1], x.shape[1], device="cpu")


def flex(mask_mod, *, batched=False, **kwargs):
    def function(x):
        q, k, v = project(x, *W)
        return flex_attention(q, k, v, block_mask=made_for(x, mask_mod, batched), enable_gqa=True, **kwargs)

    return function


def packed(x, document):
    def mask_mod(b, h, q, k):
        return (q >= k) & (document[b, q] == document[b, k])

    return flex(mask_mod, batched=True)(x)


def padded(x, seen):
    return flex(lambda b, h, q, k: (q >= k) & seen[b, k], batched=True)(x)


def rows_of_a_table(x, table):
    # A row by the query, an entry of it by the key: broadcasting the indices would read something else.
    return flex(lambda b, h, q, k: (q >= k) & table[q][k])(x)


def documents(batch=3, length=13):
    return (torch.arange(length) // 5).expand(batch, length) + torch.arange(batch)[:, None]


def right_padding(batch=3, length=13):
    return torch.arange(length) < length - torch.arange(batch)[:, None]


def holes(length=13):
    table = torch.rand(length, length, generator=torch.Generator().manual_seed(3)) < 0.6
    return table | torch.eye(length, dtype=torch.bool)


SPARSE = {
    "causal": (flex(causal), (), "causal"),
    "scale": (flex(causal, scale=0.3), (), "causal"),
    "packed documents": (packed, (documents(),), "given"),
    "padding": (padded, (right_padding(),), "causal+padding"),
    "rows of a table": (rows_of_a_table, (holes(),), "given"),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", SPARSE)
def test_the_mask_is_called_what_it_is(name, sizes):
    function, extra, form = SPARSE[name]
    found = only(capture(function, tokens(), *extra, sizes=sizes).found())
    assert found.reason is None, found.detail
    assert found.form == "flex/enable_gqa"
    assert found.source.startswith("test_match_flex_attention.py:")
    assert found.proved.mask.form == form
    assert found.proved.attention.scale == pytest.approx(0.3 if name == "scale" else HEAD_DIM**-0.5)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPARSE)
def test_with_every_block_selected_it_is_the_untouched_attention(name, inner, sparse_calls):
    function, extra, _ = SPARSE[name]
    got = sparse(function, inner=inner)(tokens(), *extra)
    torch.testing.assert_close(got, function(tokens(), *extra), atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 1


def test_another_length_needs_no_other_proof(sparse_calls):
    function = flex(causal)
    fast = sparse(function)
    for length in (13, 29, 140):
        torch.testing.assert_close(fast(tokens(2, length)), function(tokens(2, length)), atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 3


def test_a_block_mask_made_outside_of_the_forward(sparse_calls):
    def function(x, block_mask):
        return flex_attention(*project(x, *W), block_mask=block_mask, enable_gqa=True)

    block_mask = made_for(tokens(), causal)
    assert only(capture(function, tokens(), block_mask, sizes="static").found()).proved.mask.form == "causal"
    torch._dynamo.reset()
    got = sparse(function)(tokens(), block_mask)
    torch.testing.assert_close(got, function(tokens(), block_mask), atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 1


def test_heads_repeated_before_the_call_are_found(sparse_calls):
    def function(x):
        q, k, v = project(x, *W)
        return flex_attention(q, repeat_kv(k), repeat_kv(v), block_mask=made_for(x, causal))

    found = only(capture(function, tokens()).found())
    assert (found.query_heads, found.key_value_heads, found.form) == (4, 2, "flex/repeat_kv")
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_nothing_of_a_replaced_call_is_left():
    config = MSAConfig(block_size=4, topk_blocks=64)
    module = run_passes(capture(flex(causal), tokens()).dynamo, config, {}).module
    targets = {str(node.target) for node in module.graph.nodes}
    assert any("block_sparse_attention" in target for target in targets)
    assert not any(word in target for target in targets for word in ("flex", "mask_fn", "score_mod"))


def _added(score, b, h, q, k):
    return score + (q - k) * 0.25


def _capped(score, b, h, q, k):
    return 2.0 * torch.tanh(score / 2.0)


def _hidden(score, b, h, q, k):
    return torch.where(q >= k, score, -torch.inf)


def _both_returned(x):
    out, aux = flex(causal, return_aux=AuxRequest(lse=True))(x)
    return out, aux.lse


def _chosen_blocks(x):
    """Blocks that a model chose by its tokens: a sparse attention of its own."""
    blocks = -(-x.shape[1] // 16)
    chosen = (x @ torch.ones(16, 1)).mean((0, 1)).int().expand(1, 1, blocks) * 0 + 1
    indices = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        chosen, indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(x.shape[1],) * 2
    )
    return flex_attention(*project(x, *W), block_mask=block_mask, enable_gqa=True)


def _mask_of_tokens(x):
    loud = (x @ torch.ones(16, 16)).sum(-1) > 0
    return flex(lambda b, h, q, k: (q >= k) & (loud[b, k] | (q == k)), batched=True)(x)


def _cross(x):
    other = tokens(3, 13).flip(1)
    q, _, _ = project(x, *W)
    _, k, v = project(other, *W)
    return flex_attention(q, k, v, block_mask=made_for(x, causal), enable_gqa=True)


def _heads_in_another_order(x):
    q, k, v = project(x, *W)
    return flex_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), block_mask=made_for(x, causal))


REFUSED = {
    "a bias": (flex(causal, score_mod=_added), Reason.ATTENTION_BIAS),
    "a cap": (flex(causal, score_mod=_capped), Reason.UNKNOWN_FORM),
    "scores that hide": (flex(causal, score_mod=_hidden), Reason.UNKNOWN_FORM),
    "no order": (flex(everything), Reason.NOT_CAUSAL),
    "no mask": (lambda x: flex_attention(*project(x, *W), enable_gqa=True), Reason.NOT_CAUSAL),
    "a mask of each head": (
        lambda x: flex_attention(*project(x, *W), block_mask=made_for(x, per_head, heads=4), enable_gqa=True),
        Reason.MASK_PER_HEAD,
    ),
    "log-sum-exp is used": (_both_returned, Reason.WEIGHTS_USED),
    "blocks chosen by the tokens": (_chosen_blocks, Reason.DATA_DEPENDENT_MASK),
    "a mask made from the tokens": (_mask_of_tokens, Reason.DATA_DEPENDENT_MASK),
    "keys of other tokens": (_cross, Reason.CROSS_ATTENTION),
    "heads in another order": (_heads_in_another_order, Reason.HEAD_LAYOUT),
    "negative scale": (flex(causal, scale=-0.5), Reason.SCALE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_visibility_is_refused_and_stays_right(name, sparse_calls):
    function, reason = REFUSED[name]
    assert only(capture(function, tokens()).found()).reason is reason
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert not sparse_calls


def test_a_window_is_recognised_and_left_dense(sparse_calls):
    function = flex(window)
    assert only(capture(function, tokens()).found()).proved.mask.window == 5
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert not sparse_calls


def test_a_call_in_a_checkpointed_body_is_replaced(sparse_calls):
    def attend(x, block_mask):
        return flex_attention(*project(x, *W), block_mask=block_mask, enable_gqa=True)

    # Dynamo breaks the graph at a create_block_mask in the body itself.
    fast = sparse(lambda x: checkpoint(attend, x, made_for(x, causal), use_reentrant=False))
    torch.testing.assert_close(fast(tokens()), flex(causal)(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_one_new_token_sees_every_key(sparse_calls):
    offset = 12

    def function(x):
        q, k, v = project(x, *W)
        block_mask = create_block_mask(lambda b, h, q, k: q + offset >= k, None, None, 1, x.shape[1], device="cpu")
        return flex_attention(q[:, :, -1:], k, v, block_mask=block_mask, enable_gqa=True)

    assert only(capture(function, tokens(), sizes="static").found()).proved.mask.form == "causal"
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_a_mask_mod_that_cannot_be_traced_is_refused():
    captured = capture(flex(causal), tokens())
    [node] = captured.nodes(_compat.flex_attention)
    del node.meta[MASK_NAME]
    found = only(captured.found())
    assert (found.reason, found.proved) == (Reason.UNKNOWN_FORM, None)


def test_log_sum_exp_that_nobody_uses_is_no_matter(sparse_calls):
    function = flex(causal, return_aux=AuxRequest(lse=True))
    got = sparse(lambda x: function(x)[0])(tokens())
    torch.testing.assert_close(got, function(tokens())[0], atol=1e-5, rtol=1e-5)
    assert sparse_calls


def _llama(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_transformers_model_with_flex_attention(sparse_calls):
    dense, model = _llama("sdpa"), _llama("flex_attention")
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[1, :5] = 0
    msa_compile.sparsify(model, MSAConfig(block_size=4, topk_blocks=64, dense_below=0), inner="eager")
    inputs = {"input_ids": ids, "attention_mask": seen}
    real = seen.bool()
    torch.testing.assert_close(model(**inputs).logits[real], dense(**inputs).logits[real], atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 2
    report = msa_compile.explain(model)
    assert [(site.name, site.mask) for site in report.sites] == [
        (f"model.layers.{layer}.self_attn", "causal+padding") for layer in range(2)
    ]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), dense.generate(**inputs, **options))
    assert len(sparse_calls) == 2 + 4 * 2
    assert msa_compile.explain(model).dense_calls == 0
