"""Law of DESIGN.md 4: after anybody else touched a cache, selection is that of a fresh prefill, or by `"keys"`.

With one layer the keys do not depend on what was selected, so both candidates are known: the logits of one call on all
tokens, by the learned indexer or by `"keys"`.
"""

import copy
import io
import logging

import pytest
import torch
import transformers
from torch import nn

import msa_compile
from msa_compile import MSAConfig
from msa_compile.index_keys import IndexBinding, IndexKeys
from msa_compile.indexer import IndexBranch
from msa_compile.kernels.select_blocks import missed_selections
from runtime.tiny import CONFIG, llama, sparse, tokens

LEARNED = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned")
PROMPT, LENGTH = 29, 33
IDS = tokens(LENGTH)
BINDING = IndexBinding("site", (), torch.float32, source=0, dims=(0, None, 2, 3), grows=False, outputs=())


def sharp_branches(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, IndexBranch):
                for weight in module.weights():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def sharp_llama() -> nn.Module:
    model = llama(layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    model = sparse(sharp_llama(), LEARNED)
    sharp_branches(model)
    return model


@pytest.fixture(scope="module")
def by_keys() -> nn.Module:
    return sparse(sharp_llama(), CONFIG)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def new_cache(model: nn.Module, kind: str) -> transformers.Cache:
    config = model.config
    return transformers.DynamicCache(config=config) if kind == "dynamic" else transformers.StaticCache(config, 40)


def feed(model, cache, ids, start: int) -> torch.Tensor:
    """Logits of `ids`, which stand at `start`."""
    batch, length = ids.shape
    places = torch.arange(start, start + length).expand(batch, -1).contiguous()
    mask = torch.ones(batch, start + length, dtype=torch.long)
    return model(ids.contiguous(), attention_mask=mask, position_ids=places, past_key_values=cache).logits


def prefilled(model, kind: str) -> transformers.Cache:
    cache = new_cache(model, kind)
    feed(model, cache, IDS[:, :PROMPT], 0)
    return cache


def rest(model, cache) -> torch.Tensor:
    return feed(model, cache, IDS[:, PROMPT:], PROMPT)


def whole(model) -> torch.Tensor:
    return feed(model, new_cache(model, "dynamic"), IDS, 0)[:, PROMPT:]


def is_learned(found, learned, by_keys) -> bool:
    """Whether the last logits are those of the learned indexer; they must be those of one of the two."""
    gaps = [float((found - whole(model)).abs().max()) for model in (learned, by_keys)]
    assert min(gaps) < 1e-4 < 1e-2 < max(gaps), gaps
    return gaps[0] < gaps[1]


KINDS = pytest.mark.parametrize("kind", ["dynamic", "static"])


@KINDS
def test_an_untouched_cache_is_scored_with_the_learned_indexer(learned, by_keys, kind):
    missed = missed_selections.total()
    assert is_learned(rest(learned, prefilled(learned, kind)), learned, by_keys)
    assert missed_selections.total() == missed


@KINDS
def test_a_cache_that_a_dense_call_filled_is_scored_with_keys(learned, by_keys, kind, caplog):
    with msa_compile.dense(learned):
        cache = prefilled(learned, kind)
    missed_selections.clear()
    with caplog.at_level(logging.WARNING):
        assert not is_learned(rest(learned, cache), learned, by_keys)
    assert [entry.message.count("scores with") for entry in caplog.records].count(1) == 1
    assert msa_compile.explain(learned).missed_selections == missed_selections.total() == 1
    assert "1 selections of theirs by keys" in str(msa_compile.explain(learned))


@KINDS
def test_a_dense_step_in_between_is_noticed(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    with msa_compile.dense(learned):
        feed(learned, cache, IDS[:, PROMPT : PROMPT + 2], PROMPT)
    found = feed(learned, cache, IDS[:, PROMPT + 2 :], PROMPT + 2)
    expected = [whole(model)[:, 2:] for model in (learned, by_keys)]
    assert (found - expected[1]).abs().max() < 1e-4 < 1e-2 < (found - expected[0]).abs().max()


@KINDS
def test_a_foreign_copy_into_the_keys_is_noticed(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    keys = cache.layers[0].keys
    keys.copy_(keys.clone())
    assert not is_learned(rest(learned, cache), learned, by_keys)


@KINDS
def test_other_keys_by_data_are_noticed(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    keys = cache.layers[0].keys
    keys.data = keys.data.clone()
    assert not is_learned(rest(learned, cache), learned, by_keys)


def test_a_prefix_pasted_into_a_static_cache_is_noticed(learned, by_keys):
    cache, other = prefilled(learned, "static"), prefilled(learned, "static")
    cache.layers[0].keys[:, :, :16] = other.layers[0].keys[:, :, :16]
    assert not is_learned(rest(learned, cache), learned, by_keys)


def test_a_cache_that_was_reset_is_scored_with_the_learned_indexer_again(learned, by_keys):
    cache = prefilled(learned, "static")
    feed(learned, cache, tokens(8, seed=5), PROMPT)
    cache.reset()
    feed(learned, cache, IDS[:, :PROMPT], 0)
    assert is_learned(rest(learned, cache), learned, by_keys)


def test_a_static_cache_rolled_back_has_the_selection_of_a_fresh_prefill(learned, by_keys):
    cache = prefilled(learned, "static")
    feed(learned, cache, tokens(6, seed=5), PROMPT)
    cache.layers[0].cumulative_length.fill_(PROMPT)
    assert is_learned(rest(learned, cache), learned, by_keys)


def test_a_cropped_cache_is_scored_with_keys(learned, by_keys):
    cache = prefilled(learned, "dynamic")
    feed(learned, cache, tokens(6, seed=5), PROMPT)
    cache.crop(-6)
    assert not is_learned(rest(learned, cache), learned, by_keys)


@KINDS
def test_a_cache_whose_beams_were_reordered_is_scored_with_keys(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert not is_learned(rest(learned, cache), learned, by_keys)


@KINDS
def test_a_deep_copy_of_a_cache_is_scored_with_keys_and_the_original_is_not(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    twin = copy.deepcopy(cache)
    assert not is_learned(rest(learned, twin), learned, by_keys)
    assert is_learned(rest(learned, cache), learned, by_keys)


def test_nothing_of_ours_is_on_a_cached_tensor_or_in_what_is_saved_of_it(learned):
    keys = prefilled(learned, "dynamic").layers[0].keys
    file = io.BytesIO()
    torch.save(keys, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), keys)
    assert not [name for name in vars(keys) if "msa" in name]


@KINDS
def test_index_keys_made_by_other_weights_are_not_used(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    sharp_branches(learned, seed=2)
    try:
        assert not is_learned(rest(learned, cache), learned, by_keys)
        assert is_learned(rest(learned, prefilled(learned, kind)), learned, by_keys)
    finally:
        sharp_branches(learned)


def loaded(model):
    state = model.state_dict()
    model.load_state_dict({name: -value if "indexer.k_proj" in name else value for name, value in state.items()})


def cast_to_half_and_back(model):
    for part in model.modules():
        if isinstance(part, IndexBranch):
            part.to(torch.bfloat16).to(torch.float32)


def replaced(model):
    for part in model.modules():
        if isinstance(part, IndexBranch):
            part.k_proj.weight = nn.Parameter(-part.k_proj.weight)


@pytest.mark.parametrize("change", [loaded, cast_to_half_and_back, replaced])
def test_index_keys_go_out_of_use_however_the_weights_change(learned, by_keys, change):
    cache = prefilled(learned, "dynamic")
    missed = missed_selections.total()
    change(learned)
    try:
        assert not is_learned(rest(learned, cache), learned, by_keys)
        assert missed_selections.total() == missed + 1
    finally:
        sharp_branches(learned)


@KINDS
def test_a_cache_from_before_the_model_was_sparse_is_scored_with_keys(learned, by_keys, kind):
    cache = prefilled(sharp_llama(), kind)
    assert not is_learned(rest(learned, cache), learned, by_keys)


@KINDS
def test_keys_that_went_to_another_dtype_and_back_are_noticed(learned, by_keys, kind):
    cache = prefilled(learned, kind)
    keys = cache.layers[0].keys
    keys.data = keys.data.double()
    keys.data = keys.data.float()
    assert not is_learned(rest(learned, cache), learned, by_keys)


def test_index_keys_are_made_anew_on_the_device_that_their_cache_went_to():
    """The meta device stands for another one."""
    cache, keys = torch.zeros(2, 2, 8, 4, device="meta"), IndexKeys()
    keys._keep(BINDING, cache, torch.zeros(2, 1, 8, 4), ())
    given = []
    keys.bound(lambda *args: given.append(args[1]) or (), [BINDING])(cache)
    assert (given[0].device.type, given[0].shape) == ("meta", (2, 1, 8, 4))


def test_a_static_cache_written_by_another_compiled_model_is_noticed(learned, by_keys):
    cache = prefilled(learned, "static")
    other = torch.compile(sharp_llama(), backend="aot_eager", dynamic=True)
    cache.layers[0].cumulative_length.zero_()
    feed(other, cache, IDS[:, :PROMPT], 0)
    assert not is_learned(rest(learned, cache), learned, by_keys)


def test_a_deep_copy_of_the_model_does_not_use_the_index_keys_of_the_original(learned, by_keys):
    cache = prefilled(learned, "dynamic")
    twin = copy.deepcopy(learned)
    assert not is_learned(rest(twin, cache), twin, by_keys)
    assert is_learned(rest(twin, prefilled(twin, "dynamic")), twin, by_keys)


@KINDS
def test_a_cache_that_the_model_made_in_inference_mode_keeps_index_keys(learned, by_keys, kind):
    missed = missed_selections.total()
    with torch.inference_mode():
        cache = prefilled(learned, kind)
        found = rest(learned, cache)
    assert is_learned(found.clone(), learned, by_keys)
    assert missed_selections.total() == missed


def test_a_cache_that_the_model_made_in_inference_mode_goes_on_outside_of_it(learned, by_keys):
    with torch.inference_mode():
        cache = prefilled(learned, "dynamic")
    assert is_learned(rest(learned, cache), learned, by_keys)


def copied(cache, other):
    cache.layers[0].keys.copy_(cache.layers[0].keys.clone())


def pasted(cache, other):
    cache.layers[0].keys[:, :, :16] = other.layers[0].keys[:, :, :16]


def written_in_place_by_index(cache, other):
    cache.layers[0].keys.index_copy_(2, torch.arange(4), other.layers[0].keys[:, :, :4])


def reordered(cache, other):
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))


@KINDS
@pytest.mark.parametrize("disturb", [copied, pasted, written_in_place_by_index, reordered])
def test_in_inference_mode_a_foreign_write_is_noticed(learned, by_keys, kind, disturb):
    with torch.inference_mode():
        cache, other = prefilled(learned, kind), prefilled(learned, kind)
        disturb(cache, other)
        found = rest(learned, cache)
    assert not is_learned(found.clone(), learned, by_keys)


@KINDS
def test_a_cache_that_somebody_else_made_in_inference_mode_is_scored_with_keys_and_counted(learned, by_keys, kind):
    with torch.inference_mode():
        with msa_compile.dense(learned):
            cache = prefilled(learned, kind)
        assert cache.layers[0].keys.is_inference()
        missed_selections.clear()
        found = rest(learned, cache)
    assert not is_learned(found.clone(), learned, by_keys)
    assert msa_compile.explain(learned).missed_selections == 1


def test_index_keys_go_with_their_cache(learned):
    states = learned.forward.backend.index_keys._states
    before = len(states)
    cache = prefilled(learned, "dynamic")
    assert len(states) == before + 1
    del cache
    assert len(states) == before
