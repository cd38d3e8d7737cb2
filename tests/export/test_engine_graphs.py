"""What TensorRT would be given: plugins in the place of attention, converters for the rest, and sizes that fit."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")
from exported import tokens
from models.zoo import ZOO
from programs import CONFIG, program_of

import msa_compile
from msa_compile import MSAConfig
from msa_compile.errors import ExportConverterError, ExportMemoryError
from msa_compile.export.capture import Call, capture
from msa_compile.export.engine.converters import check_converters, converters, decompose, name_of, why_not
from msa_compile.export.engine.lower import Target, lower
from msa_compile.export.engine.plugins import PLUGINS
from msa_compile.export.engine.profile import profile_of
from msa_compile.export.engine.write_engine import prepare
from msa_compile.export.export_model import _WRITERS
from msa_compile.export.lint_memory import LARGEST
from msa_compile.export.sample import samples
from msa_compile.kernels.chip import CHIPS

CHIP = CHIPS[90]
NANO, PADDED = ("nanogpt", "none", False), ("llama", "explicit", True)
OTHERS = [
    pytest.param(*model, marks=pytest.mark.slow)
    for model in (
        ("llama", "none", False),
        ("llama", "none", True),
        ("llama", "static", False),
        ("qwen3", "none", False),
    )
]


def plugins_in(program):
    names = [node.target._schema.name.partition("::")[2] for node in program.graph.nodes if node.op == "call_function"
             and isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "msa"]  # fmt: skip
    return [name for name in names if name in PLUGINS], [name for name in names if name not in PLUGINS]


@pytest.mark.parametrize(("name", "cache", "padded"), [NANO, PADDED, *OTHERS])
def test_each_attention_is_plugins_and_every_other_node_has_a_converter(name, cache, padded):
    sparse = program_of(name, cache, padded=padded)
    sites = 2
    for is_python_free, kinds in ((False, 2), (True, 4)):
        program, checks, largest = prepare(sparse, CHIP, is_python_free=is_python_free)
        plugins, other = plugins_in(program)
        assert (len(plugins), len(set(plugins)), other) == (kinds * sites, kinds, [])
        assert "each with a converter in torch-tensorrt 2.13" in checks[0]
        assert 0 < largest < LARGEST


@pytest.mark.parametrize(("name", "cache", "padded"), [NANO, pytest.param(*PADDED, marks=pytest.mark.slow), *OTHERS])
def test_a_program_with_the_python_plugins_computes_what_the_sparse_program_does(name, cache, padded):
    sparse = program_of(name, cache, padded=padded)
    lowered = lower(sparse, Target(False, CHIP, 64)).module(check_guards=False)
    ours = sparse.program.module(check_guards=False)
    for call in samples(sparse, CONFIG.block_size, CONFIG.block_size * CONFIG.topk_blocks)[0]:
        expected, found = (
            torch.utils._pytree.tree_leaves(module(*call.args, **call.kwargs)) for module in (ours, lowered)
        )
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "explicit"])
def test_index_keys_of_a_learned_indexer_go_into_an_engine_beside_the_cache(cache, tmp_path, monkeypatch):
    written = []

    def keep(sparse, path, config):
        written.append(sparse)
        raise ExportMemoryError("kept, not written")

    monkeypatch.setitem(_WRITERS, "onnx", keep)
    model, example = ZOO["llama"].build(), {"input_ids": tokens(2, 23)}
    config = dataclasses.replace(CONFIG, indexer="learned")
    msa_compile.sparsify(model, config, inner="eager", example_inputs=example)
    with pytest.raises(ExportMemoryError, match="kept"):
        msa_compile.export(model, tmp_path / "m.onnx", example_inputs=example, cache=cache, max_length=64)
    (sparse,) = written
    assert [port.name for port in sparse.inputs][-2:] == [f"past_key_values.{layer}.index_key" for layer in (0, 1)]
    for is_python_free, kinds in ((False, 2), (True, 4)):
        plugins, other = plugins_in(prepare(sparse, CHIP, is_python_free=is_python_free)[0])
        assert (len(plugins), other) == (kinds * 2, [])


class Odd(nn.Module):
    """Attention, and one operation that is named."""

    def __init__(self, operation):
        super().__init__()
        self.project, self.operation = nn.Linear(16, 3 * 16), operation

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.project(x).split(16, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.operation(out.transpose(1, 2).flatten(2))


def odd_program(operation):
    length = torch.export.Dim("length", min=2, max=64)
    call = Call(Odd(operation).eval(), "", (torch.randn(2, 23, 16),), {}, ({1: length},))
    with torch.no_grad():
        return capture(call, CONFIG, {}, ())


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        (lambda x: x.cumprod(1), r"cumprod.*aten\.cumprod\.default: no converter"),
        (lambda x: x.gather(1, (x[:, :, :1] > 0).long()), r"aten\.gather\.default: its converter takes no open size"),
        (lambda x: x.sort(1).values, r"aten\.sort\.default: it sorts"),
    ],
    ids=["nothing", "open", "sort"],
)
def test_a_node_that_cannot_be_converted_is_named_with_the_reason(operation, why):
    with pytest.raises(ExportConverterError, match=why):
        check_converters(lower(odd_program(operation), Target(False, CHIP, 64)))


def test_a_split_into_sizes_that_are_open_is_refused():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 1))
    split = torch.ops.aten.split_with_sizes.default
    assert why_not(graph.call_function(split, (x, [size, 3], 1))) == "the sizes that it splits into are open"
    assert why_not(graph.call_function(split, (x, [2, 3], 1))) is None


def test_what_can_be_converted_beside_them_passes():
    program = odd_program(lambda x: x.topk(4, -1).values + x.sort(-1).values[..., :4])
    assert check_converters(lower(program, Target(True, CHIP, 64))) > 10


def test_the_table_holds_whole_what_it_keeps_and_nothing_of_it_is_left_to_chance():
    table = converters()
    assert table.version == "2.13.0"
    assert len(table.converters) > 200
    assert {"aten.linear.default", "aten.embedding.default", "aten.scatter.src"} <= set(table.converters)
    assert not table.converters["aten.gather.default"]["open"]
    nodes = decompose(lower(program_of("nanogpt"), Target(False, CHIP, 64))).graph.nodes
    names = {name_of(node.target) for node in nodes if node.op == "call_function"}
    assert "aten.linear.default" in names, "kept whole, as torch-tensorrt keeps it"
    assert "aten.transpose.int" not in names, "decomposed, as torch-tensorrt decomposes it"


def test_the_profile_has_the_ends_of_each_range_and_is_tuned_for_the_example():
    sparse = program_of("llama", "static")
    inputs = {each.name: each for each in profile_of(sparse, lower(sparse, Target(False, CHIP, 64)))}
    assert (inputs["input_ids"].least, inputs["input_ids"].usual, inputs["input_ids"].most) == (
        (1, 1),
        (2, 23),
        (64, 64),
    )
    buffer = inputs["past_0_0"]
    assert (buffer.least, buffer.usual, buffer.most) == ((1, 2, 64, 8), (2, 2, 64, 8), (64, 2, 64, 8))
    assert inputs["position"].dtype == "int64"


class Site(nn.Module):
    """One attention of 8 groups."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, heads * 128) for heads in (32, 8, 8))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 128)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def long_site(length, block_size=128):
    call = Call(Site(), "", (torch.randn(1, 40, 8),), {}, ({1: torch.export.Dim("length", min=2, max=length)},))
    with torch.no_grad():
        return capture(call, MSAConfig(block_size=block_size, topk_blocks=16, dense_below=0), {}, ())


@pytest.mark.parametrize("is_python_free", [False, True], ids=["python", "launches"])
def test_attention_of_64k_tokens_and_8_groups_stays_below_the_bound(is_python_free):
    assert prepare(long_site(65536), CHIP, is_python_free=is_python_free)[2] < LARGEST


def test_scores_between_two_launches_that_are_too_many_are_refused_and_python_plugins_are_not():
    sparse = long_site(131072)
    with pytest.raises(ExportMemoryError, match=r"ScoreBlocks.*\[1, 8, 1024, 131072\].*square of the length"):
        prepare(sparse, CHIP, is_python_free=True)
    assert prepare(sparse, CHIP, is_python_free=False)[2] <= LARGEST


def test_without_tensorrt_an_export_says_exactly_what_to_install_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("engines may be built here")
    from exported import sparse, tokens
    from models.zoo import ZOO

    given = {"input_ids": tokens(2, 23)}
    model = sparse(ZOO["llama"].build(), given)
    for path, form in (("m.engine", None), ("m.engine", "tensorrt"), ("m.plan", "tensorrt_aot")):
        with pytest.raises(msa_compile.errors.MissingPackageError, match=r"'torch-tensorrt==2\.13\.\*'.*Nothing was"):
            msa_compile.export(model, tmp_path / path, example_inputs=given, format=form, max_length=64)
    assert list(tmp_path.iterdir()) == []
