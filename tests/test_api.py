"""The verbs: their errors, what they leave behind, and what they do not touch."""

import contextlib
import functools
import inspect
from unittest import mock

import pytest
import torch
from runtime.tiny import CONFIG, EVERYTHING, LAYERS, counted_ops, llama, small, sparse, tokens
from torch import nn

import msa_compile
from msa_compile import MSAConfig, errors


def traces(model):
    """Everything of a model that sparsify could leave something in."""
    return {
        path: (
            {key: value for key, value in vars(module).items() if not key.startswith("_") or "msa" in key},
            sorted(vars(module)),
            [list(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
            list(module._buffers),
            sorted(module._non_persistent_buffers_set),
        )
        for path, module in model.named_modules()
    }


class Raises(nn.Module):
    """Attention that Dynamo meets first, and then an exception."""

    def __init__(self, error=None):
        super().__init__()
        self.inner = small()
        self.error = error

    def forward(self, ids):
        out = self.inner(ids)
        if self.error is not None:
            raise self.error
        return out


class Branches(nn.Module):
    """Control flow on data, which fake tensors do not have."""

    def __init__(self):
        super().__init__()
        self.inner = small()

    def forward(self, ids):
        out = self.inner(ids)
        if out.sum() > 1e9:
            out = out * 2
        return out


class NoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).softmax(-1)


def test_unsparsify_is_bit_identical_and_leaves_no_trace():
    model, ids = small(), tokens()
    want, before = model(ids), traces(model)
    sparse(model)
    assert not torch.equal(model(ids), want)
    assert traces(model) != before
    assert msa_compile.unsparsify(model) is model
    assert traces(model) == before
    assert torch.equal(model(ids), want)
    with pytest.raises(errors.NotSparseError, match="is not sparsified"):
        msa_compile.unsparsify(model)
    sparse(model)  # and again
    with counted_ops() as ops:
        model(ids)
    assert ops.take() == LAYERS


def test_unsparsify_after_a_graph_break_leaves_no_trace():
    model = small("in block", "in block")
    before = traces(model)
    sparse(model)(tokens())
    msa_compile.unsparsify(model)
    assert traces(model) == before


def test_sparsify_keeps_the_object_its_class_and_its_signature():
    model = small()
    signature = inspect.signature(model.forward)
    assert sparse(model) is model
    assert type(model) is type(small())
    assert inspect.signature(model.forward) == signature


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sparse(small()), errors.AlreadySparseError, "already sparsified"),
        (lambda: nn.Sequential(sparse(small())), errors.AlreadySparseError, "a module in it"),
        (lambda: torch.compile(small(), backend="eager"), errors.CompiledModelError, "_orig_mod"),
        (lambda: nn.DataParallel(small()), errors.DataParallelError, "DistributedDataParallel"),
        (lambda: small().forward, errors.NotAModuleError, r"takes a torch\.nn\.Module"),
        (lambda: 3, errors.NotAModuleError, r"takes a torch\.nn\.Module, not int"),
    ],
    ids=["twice", "inside", "compiled", "DataParallel", "function", "int"],
)
def test_a_model_in_no_state_to_be_sparsified(make, error, message):
    with pytest.raises(error, match=message):
        msa_compile.sparsify(make(), CONFIG)


def test_module_compile_before_is_refused():
    model = small()
    model.compile(backend="eager")
    with pytest.raises(errors.CompiledModelError, match=r"model\.compile"):
        msa_compile.sparsify(model, CONFIG)


def test_a_wrapped_door_is_recognised():
    """accelerate puts its own forward over the one that is there."""
    model = sparse(small())
    model.forward = functools.partial(lambda forward, ids: forward(ids), model.forward)
    with counted_ops() as ops:
        model(tokens())
    assert ops.take() == LAYERS
    with pytest.raises(errors.AlreadySparseError):
        msa_compile.sparsify(model, CONFIG)
    for verb in (msa_compile.unsparsify, lambda m: msa_compile.dense(m).__enter__()):
        with pytest.raises(errors.NotSparseError, match="wrapped since"):
            verb(model)
    model.forward = model.forward.args[0]
    msa_compile.unsparsify(model)
    assert traces(model) == traces(small())


def test_the_verbs_refuse_what_torch_compile_made():
    compiled = torch.compile(sparse(small()), backend="eager")
    with pytest.raises(errors.NotSparseError, match="_orig_mod"):
        msa_compile.unsparsify(compiled)
    assert msa_compile.explain(compiled).sparsified


def test_nothing_to_find():
    model, before = NoAttention(), traces(NoAttention())
    with pytest.raises(errors.NothingToSparsifyError, match="no attention was found"):
        msa_compile.sparsify(model, CONFIG, example_inputs=torch.zeros(2, 4))
    with pytest.raises(
        errors.NothingToSparsifyError, match=r"2 attention sites were found(.|\n)*layers\.1\.attn: excluded"
    ):
        msa_compile.sparsify(small(), MSAConfig(exclude="*attn"), example_inputs=tokens())
    assert {k: v[1:] for k, v in traces(model).items()} == {k: v[1:] for k, v in before.items()}


def test_nothing_to_find_at_the_first_call():
    model = msa_compile.sparsify(NoAttention(), CONFIG, inner="eager")
    for _ in range(2):
        with pytest.raises(errors.NothingToSparsifyError):
            model(torch.zeros(2, 4))
    msa_compile.unsparsify(model)
    assert model(torch.zeros(2, 4)).shape == (2, 4)


def test_strict_refuses_any_site_that_was_meant():
    model = small("before attention", "")
    with pytest.raises(errors.SiteRefusedError, match=r"1 attention sites cannot be made sparse(.|\n)*layers\.0\.attn"):
        sparse(model, MSAConfig(4, 3, dense_below=0, strict=True))
    sparse(model, MSAConfig(4, 3, dense_below=0, strict=True, exclude="layers.0.*"))
    assert len(msa_compile.explain(model).sparse) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, "example_inputs is a int; give a dict"),
        ({"ids": 1, "no_such": 1}, r"no_such.*Its signature is \(ids"),
        ((), "missing a required argument"),
        ((1, 2, 3), "too many positional arguments"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs, message):
    model = small()
    before = traces(model)
    with pytest.raises(errors.ExampleInputsError, match=message):
        msa_compile.sparsify(model, CONFIG, example_inputs=inputs)
    assert traces(model) == before


def test_explain_with_arguments_that_do_not_fit():
    with pytest.raises(errors.ExampleInputsError, match="Its signature is"):
        msa_compile.explain(small(), tokens(), nonsense=1)
    with pytest.raises(errors.ExampleInputsError, match="needs the arguments of a call"):
        msa_compile.explain(small())


@pytest.mark.parametrize(
    "inputs", [tokens(), (tokens(),), [tokens()], {"ids": tokens()}, {"ids": tokens(), "scale": 2.0}]
)
def test_example_inputs_of_every_kind(inputs):
    report = msa_compile.explain(sparse(small(), example_inputs=inputs))
    assert len(report.sparse) == LAYERS


def test_unknown_inner_compiler():
    with pytest.raises(errors.ConfigError, match="inner='fast' is no inner compiler; choose one of inductor"):
        msa_compile.sparsify(small(), CONFIG, inner="fast")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("where", ["model", "discover.run_passes", "api.install_markers", "api.hang_door"])
def test_failure_half_way_leaves_the_model_as_it_was(where, error):
    model, ids = Raises(error if where == "model" else None), tokens()
    before, want = traces(model), small()(ids)
    real = msa_compile.api.install_markers

    def half(model, carriers):
        real(model, dict(list(carriers.items())[:1]))
        raise error

    fails = half if where == "api.install_markers" else mock.Mock(side_effect=error)
    patch = contextlib.nullcontext() if where == "model" else mock.patch(f"msa_compile.{where}", fails)
    with patch, pytest.raises((type(error), errors.CaptureError)):
        msa_compile.sparsify(model, CONFIG, example_inputs=(ids,))
    assert traces(model) == before
    model.error = None
    assert torch.equal(model(ids), want)


def test_a_forward_on_the_instance_is_kept_and_restored():
    model, ids = small(), tokens()
    wrapped = functools.partial(type(model).forward, model)
    model.forward = lambda ids: wrapped(ids) + 1
    mine, want = model.forward, model(ids)
    sparse(model, EVERYTHING)
    with counted_ops() as ops:
        torch.testing.assert_close(model(ids), want)
    assert ops.take() == LAYERS
    with msa_compile.dense(model):
        assert torch.equal(model(ids), want)
        assert model.forward is mine
    msa_compile.unsparsify(model)
    assert model.forward is mine


def test_dense_is_the_untouched_model_and_counts_nothing():
    model, ids = sparse(small()), tokens()
    plain = traces(small())
    want = small()(ids)
    with counted_ops() as ops:
        with msa_compile.dense(model) as same:
            assert same is model
            assert [value[1:] for value in traces(model).values()] == [value[1:] for value in plain.values()]
            assert torch.equal(model(ids), want)
            with msa_compile.dense(model):
                assert torch.equal(model(ids), want)
            assert torch.equal(model(ids), want), "the inner block ended, the outer has not"
            assert msa_compile.explain(model).sparsified
        assert ops.take() == 0
        model(ids)
        assert ops.take() == LAYERS
        with pytest.raises(ZeroDivisionError), msa_compile.dense(model):
            _ = 1 / 0
        model(ids)
        assert ops.take() == LAYERS
    assert msa_compile.explain(model).dense_calls == 0


def test_unsparsify_inside_dense_stays_dense():
    model, ids = sparse(small()), tokens()
    with msa_compile.dense(model):
        msa_compile.unsparsify(model)
    assert [value[1:] for value in traces(model).values()] == [value[1:] for value in traces(small()).values()]
    assert torch.equal(model(ids), small()(ids))
    with pytest.raises(errors.NotSparseError), msa_compile.dense(model):
        pass


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "layers.1.*"}, ["layers.1.attn"]),
        ({"exclude": ("*.1.*",)}, ["layers.0.attn"]),
        ({"include": ("layers.*",), "exclude": ("layers.0.attn",)}, ["layers.1.attn"]),
    ],
)
def test_globs_choose_the_sites(options, names):
    model = sparse(small(), MSAConfig(4, 3, dense_below=0, **options))
    with counted_ops() as ops:
        model(tokens())
    assert ops.take() == len(names)
    report = msa_compile.explain(model)
    assert [site.name for site in report.sparse] == names
    assert {site.reason for site in report.dense} == {msa_compile.Reason.EXCLUDED}


@pytest.mark.parametrize(
    "call", [lambda m: msa_compile.explain(m, tokens()), lambda m: msa_compile.explain(m, ids=tokens())]
)
def test_explain_changes_nothing(call):
    model, ids = small(), tokens()
    want, before = model(ids), traces(model)
    with counted_ops() as ops:
        report = call(model)
    assert (ops.take(), report.sparsified, len(report.sparse)) == (0, False, LAYERS)
    assert traces(model) == before
    assert torch.equal(model(ids), want)
    model = sparse(model)
    found = call(model)
    assert found.sparsified
    assert [site.name for site in found.sparse] == [site.name for site in report.sparse]
    assert msa_compile.explain(model).dense_calls == 0


def test_explain_of_a_transformers_model_brings_its_own_inputs():
    model = llama()
    before = traces(model)
    report = msa_compile.explain(model, config=CONFIG)
    assert [site.name for site in report.sparse] == [f"model.layers.{index}.self_attn" for index in range(LAYERS)]
    assert {site.mask for site in report.sparse} == {"causal+padding"}
    assert traces(model) == before


def test_explain_takes_no_second_config():
    model = sparse(small())
    assert msa_compile.explain(model, config=CONFIG).config == CONFIG
    with pytest.raises(errors.AlreadySparseError):
        msa_compile.explain(model, config=EVERYTHING)


def test_sites_are_found_at_the_first_call():
    model, ids = msa_compile.sparsify(small(), EVERYTHING, inner="eager"), tokens()
    with counted_ops() as ops:
        torch.testing.assert_close(model(ids), small()(ids))
    assert ops.take() == LAYERS
    assert len(msa_compile.explain(model).sparse) == LAYERS
    model.layers[0].attn(torch.zeros(1, 3, 32))
    assert msa_compile.explain(model).dense_calls == 1
    msa_compile.unsparsify(model)
    assert [value[1:] for value in traces(model).values()] == [value[1:] for value in traces(small()).values()]


def test_control_flow_on_data_works_at_the_first_call():
    model, ids = Branches(), tokens()
    want, before = model(ids), traces(model)
    with pytest.raises(errors.CaptureError, match="without example_inputs"):
        msa_compile.sparsify(model, EVERYTHING, example_inputs=ids)
    assert traces(model) == before
    msa_compile.sparsify(model, EVERYTHING, inner="eager")
    with counted_ops() as ops:
        for _ in range(2):
            torch.testing.assert_close(model(ids), want)
            assert ops.take() == LAYERS
    report = msa_compile.explain(model)
    assert {site.name for site in report.sparse} == {f"inner.layers.{index}.attn" for index in range(LAYERS)}
    assert report.dense_calls == 0
    model.inner.layers[0](torch.zeros(1, 3, 32))
    assert msa_compile.explain(model).dense_calls == 1
    msa_compile.unsparsify(model)
    assert traces(model) == before


def test_a_models_own_exception_surfaces_at_the_first_call():
    model = msa_compile.sparsify(Raises(ValueError("mine")), CONFIG, inner="eager")
    with pytest.raises(ValueError, match="mine"):
        model(tokens())
    model.error = None
    with counted_ops() as ops:
        model(tokens())
    assert ops.take() == LAYERS
