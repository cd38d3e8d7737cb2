"""Whatever the mask, a sparse model whose budget covers every key is the dense model; padding is never dropped."""

import pytest
import refused_models
import torch

import msa_compile
from msa_compile import MSAConfig

FULL = MSAConfig(block_size=4, topk_blocks=64, dense_below=0)
LENGTHS = (17, 31, 6)


def ids_of(batch, length):
    return torch.randint(0, refused_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def positions(batch, length):
    return torch.stack([torch.cat([torch.arange(cut), torch.arange(length - cut)]) for cut in (3, 5, 1)[:batch]])


def holes(batch, length):
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    for row in range(batch):
        seen[row, :, :, row + 1 :: 3] = False
    return seen | torch.eye(length, dtype=torch.bool)


MODELS = {
    "chunked": (refused_models.Chunked, lambda batch, length: ()),
    "packed": (refused_models.Packed, lambda batch, length: (positions(batch, length),)),
    "prefix": (refused_models.Prefix, lambda batch, length: (torch.tensor([4, 1, 6])[:batch],)),
    "holes": (refused_models.HandedIn, lambda batch, length: (holes(batch, length),)),
    "padded": (refused_models.Padded, lambda batch, length: (padding("left", batch, length),)),
}


def padding(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        width = min(1 + 2 * row, length - 2)
        if kind == "left":
            mask[row, :width] = 0
        elif kind == "right":
            mask[row, length - width :] = 0
        else:
            mask[row, row : length - 1 : 3] = 0
    return mask


@pytest.mark.parametrize("name", MODELS)
def test_a_full_budget_is_the_dense_model(name, sparse_calls):
    make, extra = MODELS[name]
    model = make().eval()
    expected = {length: model(ids_of(3, length), *extra(3, length)) for length in LENGTHS}
    msa_compile.sparsify(model, FULL, inner="eager", example_inputs=(ids_of(3, 17), *extra(3, 17)))
    assert [site.mask for site in msa_compile.explain(model).sparse] == [
        "causal+padding" if name == "padded" else "given"
    ] * 2
    for length in LENGTHS:
        got = model(ids_of(3, length), *extra(3, length))
        real = torch.ones(3, length, dtype=torch.bool)
        if name == "padded":
            real = extra(3, length)[0].bool()
        torch.testing.assert_close(got[real], expected[length][real], atol=1e-4, rtol=1e-4)
    assert len(sparse_calls) == 2 * len(LENGTHS)


@pytest.mark.parametrize("name", ["chunked", "packed", "prefix", "holes", "padded"])
def test_few_blocks_see_nothing_that_the_mask_hides(name, sparse_calls):
    make, extra = MODELS[name]
    model = make().eval()
    arguments = (ids_of(3, 31), *extra(3, 31))
    config = MSAConfig(block_size=4, topk_blocks=2, dense_below=0)
    msa_compile.sparsify(model, config, inner="eager", example_inputs=arguments)
    x = model.embedding(arguments[0])
    seen = model.mask(x, *arguments[1:]).expand(3, 1, 31, 31)[:, 0].float()
    reach = (seen + torch.eye(31)).bool().float()
    reach = (reach @ reach) > 0  # two layers
    for poisoned in (2, 9, 20):
        changed = arguments[0].clone()
        changed[:, poisoned] = (changed[:, poisoned] + 7) % refused_models.VOCABULARY
        moved = (model(changed, *arguments[1:]) - model(*arguments)).abs().amax(-1) > 0
        assert not (moved & ~reach[:, :, poisoned]).any()
        assert moved[:, poisoned].all()
    assert sparse_calls


def test_a_packed_document_equals_the_document_alone(sparse_calls):
    model = refused_models.Packed().eval()
    first, second = ids_of(1, 7), ids_of(1, 26)
    packed = torch.cat([first, second], dim=1)
    places = torch.cat([torch.arange(7), torch.arange(26)])[None]
    config = MSAConfig(block_size=4, topk_blocks=2, dense_below=0)
    msa_compile.sparsify(model, config, inner="eager", example_inputs=(packed, places))
    together = model(packed, places)
    torch.testing.assert_close(together[:, :7], model(first, torch.arange(7)[None]))
    torch.testing.assert_close(together[:, 7:], model(second, torch.arange(26)[None]))
    assert len(sparse_calls) == 6


@pytest.mark.parametrize("topk_blocks", [64, 2])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_poisoned_padding_changes_no_real_token(kind, topk_blocks, sparse_calls):
    model = refused_models.Padded().eval()
    with torch.no_grad():
        model.embedding.weight[0] = 1e4
    mask = padding(kind, 3, 27)
    ids = ids_of(3, 27).clamp(min=1)
    config = MSAConfig(block_size=4, topk_blocks=topk_blocks, dense_below=0)
    clean_dense = model(ids, mask)
    msa_compile.sparsify(model, config, inner="eager", example_inputs=(ids, mask))
    clean = model(ids, mask)
    poisoned = model(torch.where(mask == 1, ids, 0), mask)
    real = mask == 1
    torch.testing.assert_close(poisoned[real], clean[real], atol=1e-5, rtol=1e-5)
    if topk_blocks == 64:
        torch.testing.assert_close(clean[real], clean_dense[real], atol=1e-4, rtol=1e-4)
    assert len(sparse_calls) == 4


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_poisoned_padding_changes_no_real_token_of_a_llama(kind, sparse_calls):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.linspace(-300, 300, 32)
    mask = padding(kind, 3, 27)
    ids = ids_of(3, 27).clamp(min=3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, **call).logits
        msa_compile.sparsify(model, MSAConfig(block_size=4, topk_blocks=32, dense_below=0), inner="eager")
        clean = model(ids, **call).logits
        poisoned = model(torch.where(mask == 1, ids, 0), **call).logits
    real = mask == 1
    torch.testing.assert_close(clean[real], expected[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(poisoned[real], clean[real], atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 4
