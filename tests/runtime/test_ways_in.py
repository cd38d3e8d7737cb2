"""Law 7: whichever way a sparsified model is called, it is sparse or it says so."""

import logging

import pytest
import torch
import transformers
from torch import nn

import msa_compile
from msa_compile.errors import ExportNotSparseError
from msa_compile.markers import marker_tokens
from runtime.tiny import LAYERS, OpCount, counted_ops, small, sparse, tokens


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits * 2


def logits_of(model):
    def call(ids):
        return model(ids).logits + 1

    return call


COMPILED = {
    "model": lambda model: model,
    "wrapper module": Wrapper,
    "function": logits_of,
    "forward": lambda model: model.forward,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def dense_calls(sparse_llama):
    for token in marker_tokens(sparse_llama).values():
        token.zero_()  # the warning comes once a site
    return lambda: msa_compile.explain(sparse_llama).dense_calls


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m.forward(x)], ids=["call", "forward"])
def test_plain_calls_are_sparse(sparse_llama, ops: OpCount, dense_calls, call):
    call(sparse_llama, tokens())
    assert (ops.take(), dense_calls()) == (LAYERS, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("way", COMPILED)
def test_somebody_elses_compile_stays_sparse(sparse_llama, ops: OpCount, dense_calls, way, backend):
    ids = tokens()
    want = sparse_llama(ids).logits
    ops.take()
    compiled = torch.compile(COMPILED[way](sparse_llama), backend=backend)
    got = compiled(ids)
    assert (ops.take(), dense_calls()) == (LAYERS, 0)
    expected = {"wrapper module": want * 2, "function": want + 1}.get(way, want)
    torch.testing.assert_close(got if isinstance(got, torch.Tensor) else got.logits, expected)


@pytest.mark.parametrize("way", COMPILED)
def test_fullgraph_is_sparse_or_a_clear_error(sparse_llama, ops: OpCount, dense_calls, way):
    compiled = torch.compile(COMPILED[way](sparse_llama), backend="eager", fullgraph=True)
    refused = ""
    try:
        compiled(tokens())
    except torch._dynamo.exc.Unsupported as error:
        refused = str(error)
    # torch.compile takes a model's own forward, which is the door, as it is: no error then.
    assert (ops.take(), dense_calls()) == (0 if refused else LAYERS, 0)
    assert not refused or "sparsified by msa_compile compiles itself" in refused


def test_module_compile_on_top_stays_sparse(ops: OpCount):
    model = sparse(small())
    model.compile(backend="eager")
    model(tokens())
    assert (ops.take(), msa_compile.explain(model).dense_calls) == (LAYERS, 0)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_auto_compile_of_static_cache_decode_stays_sparse(sparse_llama, ops: OpCount, dense_calls, fullgraph):
    compile_config = transformers.CompileConfig(fullgraph=fullgraph, backend="eager")
    compile_config._compile_all_devices = True
    new = 4
    sparse_llama.generate(
        tokens(20),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert (ops.take(), dense_calls()) == (LAYERS * new, 0)


@pytest.mark.parametrize(
    "part", [lambda m: m.model, lambda m: torch.compile(m.model, backend="eager")], ids=["plain", "compiled"]
)
def test_a_call_of_the_inner_model_says_that_it_is_dense(sparse_llama, ops: OpCount, dense_calls, part, caplog):
    with caplog.at_level(logging.WARNING, "msa_compile"):
        part(sparse_llama)(tokens())
    assert (ops.take(), dense_calls()) == (0, LAYERS)
    assert "model.layers.0.self_attn ran DENSE although the model is sparsified" in caplog.text


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])
def test_a_call_of_an_attention_module_says_that_it_is_dense(ops: OpCount, caplog, backend):
    model = sparse(small())
    attention = model.layers[1].attn if backend is None else torch.compile(model.layers[1].attn, backend=backend)
    with caplog.at_level(logging.WARNING, "msa_compile"):
        for _ in range(3):
            attention(torch.randn(2, 9, 32))
    assert ops.take() == 0
    assert msa_compile.explain(model).dense_calls == 3
    assert caplog.text.count("layers.1.attn ran DENSE") == 1


def test_the_force_eager_stance_says_that_it_is_dense(sparse_llama, ops: OpCount, dense_calls, caplog):
    with caplog.at_level(logging.WARNING, "msa_compile"), torch.compiler.set_stance("force_eager"):
        sparse_llama(tokens())
    assert (ops.take(), dense_calls()) == (0, LAYERS)
    assert "ran DENSE" in caplog.text


def test_attention_in_the_root_module_says_so_too(ops: OpCount, caplog):
    attention = sparse(small().layers[0].attn, example_inputs=torch.randn(1, 9, 32))
    x = torch.randn(2, 21, 32)
    attention(x)
    assert (ops.take(), msa_compile.explain(attention).dense_calls) == (1, 0)
    with caplog.at_level(logging.WARNING, "msa_compile"), torch.compiler.set_stance("force_eager"):
        attention(x)
    assert (ops.take(), msa_compile.explain(attention).dense_calls) == (0, 1)
    assert "<root> ran DENSE" in caplog.text


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper], ids=["model", "wrapper"])
def test_export_is_a_clear_error(sparse_llama, wrap):
    with pytest.raises(ExportNotSparseError, match=r"with msa_compile\.dense"):
        torch.export.export(wrap(sparse_llama), (tokens(),))


def test_strict_export_is_a_clear_error(sparse_llama):
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"msa_compile\.dense"):
        torch.export.export(sparse_llama, (tokens(),), strict=True)


def test_export_of_an_inner_module_keeps_the_marker():
    model = sparse(small())
    program = torch.export.export(model.layers[0], (torch.randn(2, 9, 32),))
    assert "msa.site" in str(program.graph)


@pytest.mark.parametrize("strict", [False, True])
def test_export_inside_dense_has_no_trace_of_us(strict):
    model, ids = sparse(small()), tokens()
    with msa_compile.dense(model):
        program = torch.export.export(model, (ids,), strict=strict)
    assert "msa" not in str(program.graph)
    assert program.state_dict.keys() == small().state_dict().keys()
    torch.testing.assert_close(program.module()(ids), small()(ids))
    with counted_ops() as ops:
        model(ids)
    assert ops.take() == LAYERS


def test_jit_trace_is_an_error():
    with pytest.raises(RuntimeError, match="dynamo-optimized"):
        torch.jit.trace(sparse(small()), tokens())


def test_functional_call_is_sparse_and_uses_the_given_weights(ops: OpCount):
    model, ids = sparse(small()), tokens()
    model(ids)
    ops.take()
    other = dict(small(seed=1).named_parameters())
    got = torch.func.functional_call(model, other, (ids,))
    assert ops.take() == LAYERS
    torch.testing.assert_close(got, sparse(small(seed=1))(ids))
