import dataclasses
import doctest
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_compile import config as config_module
from msa_compile.config import MSAConfig
from msa_compile.errors import ConfigError, MSAError, UnknownOptionError


def test_defaults_are_the_published_ones():
    config = MSAConfig()
    assert (config.block_size, config.topk_blocks, config.local_blocks, config.sink_blocks) == (128, 16, 1, 0)
    assert (config.indexer, config.include, config.exclude) == ("auto", ("*",), ())
    assert (config.dense_below, config.strict, config.budgets) == ("auto", False, ())
    assert (config.index_scores, config.candidates, config.index_cache) == ("exact", 0, "exact")


def test_fp8_scores_have_twice_as_many_candidates_as_a_site_has_blocks():
    config = MSAConfig(topk_blocks=5, budgets={"a": 8}, index_scores="fp8")
    assert (config.candidates, config.for_site("a").candidates) == (10, 16)


def test_config_is_frozen_hashable_and_survives_pickling():
    config = MSAConfig(include=["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(MSAConfig(include=("a", "b")))


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("block_size", 0, "an int from 1 to 65536"),
        ("block_size", 65537, "an int from 1 to 65536"),
        ("block_size", True, "an int from 1 to 65536"),
        ("block_size", 128.0, "an int from 1 to 65536"),
        ("block_size", "128", "an int from 1 to 65536"),
        ("block_size", None, "an int from 1 to 65536"),
        ("topk_blocks", 0, "an int of 1 or more"),
        ("topk_blocks", False, "an int of 1 or more"),
        ("topk_blocks", [16], "an int of 1 or more"),
        ("local_blocks", 0, "an int from 1 to 16 (topk_blocks)"),
        ("local_blocks", 17, "an int from 1 to 16 (topk_blocks)"),
        ("sink_blocks", -1, "an int from 0 to 15 (topk_blocks - local_blocks)"),
        ("sink_blocks", 16, "an int from 0 to 15 (topk_blocks - local_blocks)"),
        ("indexer", "keyz", "one of 'auto', 'keys'"),
        ("indexer", None, "one of 'auto', 'keys'"),
        ("indexer", ["keys"], "one of 'auto', 'keys'"),
        ("index_scores", "fp4", "one of 'exact', 'fp8'"),
        ("index_scores", 8, "one of 'exact', 'fp8'"),
        ("index_cache", None, "one of 'exact', 'fp8'"),
        ("include", 3, "a glob over module paths"),
        ("include", ("*", 3), "a glob over module paths"),
        ("include", (), "at least one glob"),
        ("exclude", None, "a glob over module paths"),
        ("exclude", {"*": 1}, "a glob over module paths"),
        ("dense_below", -1, "'auto' or an int of 0 or more"),
        ("dense_below", True, "'auto' or an int of 0 or more"),
        ("dense_below", "never", "'auto' or an int of 0 or more"),
        ("dense_below", None, "'auto' or an int of 0 or more"),
        ("strict", 1, "True or False"),
        ("strict", "yes", "True or False"),
        ("budgets", 3, "a dict from globs"),
        ("budgets", ("a", 3), "a dict from globs"),
        ("budgets", {"*": 0}, "ints from 1 (local_blocks + sink_blocks)"),
        ("budgets", {"*": True}, "ints from 1"),
        ("budgets", {3: 4}, "globs over module paths"),
    ],
)
def test_illegal_value_names_field_value_and_range(field, value, legal):
    with pytest.raises(ConfigError) as caught:
        MSAConfig(**{field: value})
    assert f"MSAConfig.{field} is {value!r}; it must be" in str(caught.value)
    assert legal in str(caught.value)
    assert isinstance(caught.value, MSAError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("indexer", ["auto", "keys", "learned"])
def test_each_indexer_can_be_asked_for(indexer):
    assert MSAConfig(indexer=indexer).indexer == indexer


@given(
    block_size=st.integers(1, 65536),
    topk_blocks=st.integers(1, 4096),
    data=st.data(),
)
def test_every_value_in_range_is_accepted(block_size, topk_blocks, data):
    local_blocks = data.draw(st.integers(1, topk_blocks))
    sink_blocks = data.draw(st.integers(0, topk_blocks - local_blocks))
    config = MSAConfig(block_size, topk_blocks, local_blocks, sink_blocks)
    assert config.resolved_dense_below() == topk_blocks * block_size


@given(topk_blocks=st.integers(1, 64), local_blocks=st.integers(1, 64), sink_blocks=st.integers(0, 64))
def test_forced_blocks_never_exceed_the_slots(topk_blocks, local_blocks, sink_blocks):
    if local_blocks + sink_blocks <= topk_blocks:
        MSAConfig(topk_blocks=topk_blocks, local_blocks=local_blocks, sink_blocks=sink_blocks)
    else:
        with pytest.raises(ConfigError, match=r"local_blocks|sink_blocks"):
            MSAConfig(topk_blocks=topk_blocks, local_blocks=local_blocks, sink_blocks=sink_blocks)


def test_one_string_is_one_glob_and_a_list_becomes_a_tuple():
    config = MSAConfig(include="model.*", exclude=["a", "b"])
    assert config.include == ("model.*",)
    assert config.exclude == ("a", "b")


@pytest.mark.parametrize(
    ("include", "exclude", "name", "expected"),
    [
        ("*", (), "", True),
        ("*", (), "model.layers.3.self_attn", True),
        ("model.layers.*.self_attn", (), "model.layers.3.self_attn", True),
        ("model.layers.*.self_attn", (), "model.layers.3.mlp", False),
        ("model.layers.[0-3].*", (), "model.layers.4.self_attn", False),
        (("a", "b"), (), "b", True),
        ("*", "*.0.self_attn", "layers.0.self_attn", False),
        ("*", ("*.0.*", "*.1.*"), "layers.2.self_attn", True),
        ("Layers.*", (), "layers.0", False),
    ],
)
def test_matches_takes_include_and_lets_exclude_win(include, exclude, name, expected):
    assert MSAConfig(include=include, exclude=exclude).matches(name) is expected


def test_a_site_has_its_own_budget_and_the_first_glob_counts():
    config = MSAConfig(budgets={"layers.0.*": 64, "layers.*": 8}, exclude="lm.*")
    assert config.budgets == (("layers.0.*", 64), ("layers.*", 8))
    assert hash(config) == hash(MSAConfig(budgets=(("layers.0.*", 64), ("layers.*", 8)), exclude="lm.*"))
    assert config != MSAConfig(exclude="lm.*")
    names = ("layers.0.attn", "layers.1.attn", "tail")
    assert [config.for_site(name).topk_blocks for name in names] == [64, 8, 16]
    assert config.for_site("tail") == MSAConfig(exclude="lm.*")
    with pytest.raises(ConfigError, match=r"ints from 3"):
        MSAConfig(local_blocks=2, sink_blocks=1, budgets={"*": 2})


@pytest.mark.parametrize(("dense_below", "expected"), [("auto", 512), (0, 0), (7, 7)])
def test_resolved_dense_below(dense_below, expected):
    assert MSAConfig(block_size=64, topk_blocks=8, dense_below=dense_below).resolved_dense_below() == expected


def test_from_options_takes_fields_and_leaves_the_callers_own_options():
    config = MSAConfig.from_options({"block_size": 64, "include": ["a"], "inner": "eager"}, also=("inner",))
    assert config == MSAConfig(block_size=64, include=("a",))
    assert MSAConfig.from_options(None) == MSAConfig.from_options({}) == MSAConfig()


def test_from_options_refuses_unknown_names_and_suggests_close_ones():
    with pytest.raises(UnknownOptionError, match=r"unknown option 'topk_block' \(did you mean 'topk_blocks'") as caught:
        MSAConfig.from_options({"topk_block": 4, "zzz": 1})
    assert "unknown option 'zzz'." in str(caught.value)
    assert "Legal options: block_size, topk_blocks" in str(caught.value)


def test_from_options_suggests_the_callers_own_options_too():
    with pytest.raises(UnknownOptionError, match="did you mean 'inner'"):
        MSAConfig.from_options({"iner": "eager"}, also=("inner",))


def test_from_options_validates_values():
    with pytest.raises(ConfigError, match=r"MSAConfig\.block_size is 0"):
        MSAConfig.from_options({"block_size": 0})


def test_examples_in_the_docstrings_hold():
    outcome = doctest.testmod(config_module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
