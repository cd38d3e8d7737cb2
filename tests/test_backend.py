"""``torch.compile(model, backend="msa", options={...})``."""

from unittest import mock

import pytest
import torch
from runtime.tiny import LAYERS, counted_ops, small, tokens
from torch import nn

from msa_compile import MSAConfig
from msa_compile._compat import BackendCompilerFailed
from msa_compile.backend import INNER_COMPILERS, MSABackend
from msa_compile.errors import CaptureError, ConfigError, SiteRefusedError, UnknownOptionError

OPTIONS = {"block_size": 4, "topk_blocks": 3, "dense_below": 0, "inner": "eager"}
COVERING = {**OPTIONS, "topk_blocks": 64}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """These compile the class's own code, whose cache all models of the class share."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model, options, **more):
    return torch.compile(model, backend="msa", options=options, **more)


@pytest.mark.parametrize("inner", INNER_COMPILERS)
def test_every_inner_compiler_runs_the_sparse_graph(inner):
    model, ids = small(), tokens()
    fast = compiled(model, {**COVERING, "inner": inner})
    with counted_ops() as ops:
        got = fast(ids)
    assert ops.take() == LAYERS
    torch.testing.assert_close(got, model(ids))


def test_entry_point_is_registered():
    assert "msa" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"blok_size": 4}, UnknownOptionError, "unknown option 'blok_size' .did you mean 'block_size'"),
        ({"block_size": 0}, ConfigError, "MSAConfig.block_size is 0"),
        ({"inner": "fast"}, ConfigError, "inner='fast' is no inner compiler"),
        (
            {"strict": True, "exclude": "nothing", "inner": "eager"},
            SiteRefusedError,
            "strict=True, and 1 attention sites",
        ),
    ],
)
def test_a_mistake_in_the_options_surfaces(options, error, message):
    model = small("before attention", "")  # its first attention cannot be made sparse
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        compiled(model, options)(tokens())
    assert isinstance(caught.value.inner_exception, error)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_is_passed_to_inductor(mode):
    # torch.compile takes mode or options, not both: the options are set by the defaults here.
    with mock.patch("torch._inductor.compile", side_effect=lambda gm, inputs, options: gm) as inductor:
        torch.compile(small(), backend="msa", mode=mode)(tokens())
    assert inductor.call_args.kwargs["options"] == torch._inductor.list_mode_options(mode)
    assert inductor.call_args.kwargs["options"]


def test_without_a_mode_inductor_gets_no_options():
    with mock.patch("torch._inductor.compile", side_effect=lambda gm, inputs, options: gm) as inductor:
        torch.compile(small(), backend="msa")(tokens())
    assert inductor.call_args.kwargs["options"] == {}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_mode_with_another_inner_compiler_is_refused(inner):
    with pytest.raises(UnknownOptionError, match=f"mode='max-autotune' is a mode of Inductor.*{inner}"):
        MSABackend(MSAConfig(), inner, mode="max-autotune")
    MSABackend(MSAConfig(), inner, mode="default")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small()

    def forward(self, ids, scale):
        return self.inner(ids) * scale


@pytest.mark.parametrize("floats", [False, True])
def test_dynamic_true_needs_one_graph_for_many_lengths(floats):
    """Floats come in as 0-d tensors then."""
    model = Scaled()
    with mock.patch.object(MSABackend, "__call__", autospec=True, side_effect=MSABackend.__call__) as backend:
        fast = compiled(model, COVERING, dynamic=True)
        with counted_ops() as ops:
            for index, length in enumerate((9, 14, 22, 31)):
                ids, scale = tokens(length), 0.5 + index * floats
                torch.testing.assert_close(fast(ids, scale), model(ids, scale))
                assert ops.take() == LAYERS
    assert backend.call_count == 1


def test_dynamic_false_makes_a_graph_for_each_length():
    model = small()
    with mock.patch.object(MSABackend, "__call__", autospec=True, side_effect=MSABackend.__call__) as backend:
        fast = compiled(model, COVERING, dynamic=False)
        with counted_ops() as ops:
            for length in (9, 14, 9):
                torch.testing.assert_close(fast(tokens(length)), model(tokens(length)))
                assert ops.take() == LAYERS
    assert backend.call_count == 2


def test_fullgraph():
    with counted_ops() as ops:
        compiled(small(), OPTIONS, fullgraph=True)(tokens())
    assert ops.take() == LAYERS
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(small("in block", "in block"), OPTIONS, fullgraph=True)(tokens())


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_two_configs_never_share_compiled_code(inner):
    model, ids = small(), tokens(40)
    with counted_ops() as ops:
        outs = [compiled(model, {**OPTIONS, "inner": inner, "topk_blocks": topk})(ids) for topk in (1, 3, 64, 1)]
    assert ops.take() == 4 * LAYERS
    assert torch.equal(outs[0], outs[3])
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (outs[first] - outs[second]).abs().max() > 1e-4
    torch.testing.assert_close(outs[2], model(ids))


@pytest.mark.parametrize("where", ["msa_compile.backend.run_passes", "msa_compile.backend.MSABackend._compile"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), NotImplementedError("boom"), AssertionError("boom")])
def test_only_our_errors_leave_the_backend(where, error):
    with (
        mock.patch(where, side_effect=error),
        pytest.raises(BackendCompilerFailed, match=f"{type(error).__name__} while compiling.*boom") as caught,
    ):
        compiled(small(), OPTIONS)(tokens())
    assert isinstance(caught.value.inner_exception, CaptureError)
    assert caught.value.inner_exception.__cause__ is error


def test_ctrl_c_leaves_the_backend_as_it_is():
    with mock.patch("msa_compile.backend.run_passes", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        MSABackend(MSAConfig(), "eager")(mock.Mock(), [])
