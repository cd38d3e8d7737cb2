"""The canonical graph computes the same, keeps the interface, and opens nothing that must stay shut."""

import functools

import pytest
import torch
from tiny_attention import capture, only, project, sparse, tokens, weights
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from msa_compile import _compat
from msa_compile.passes.canonicalize import canonicalize
from msa_compile.passes.detect_attention import detect_attention
from msa_compile.passes.graph_facts import is_owned
from msa_compile.records import Reason

aten = torch.ops.aten
SIZES = pytest.mark.parametrize("sizes", ["dynamic", "static", "all"])


def attend(x, w, **kwargs):
    q, k, v = project(x, *w)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **kwargs)


def placeholders(gm):
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def opaque(captured):
    return [node for node in captured.graph.nodes if isinstance(node.target, _compat.HigherOrderOperator)]


@SIZES
def test_inputs_keep_their_order_names_and_meta(sizes):
    w = weights()

    def function(x, scale, other):
        return attend(x, w) * scale + other["b"] - other["a"]

    captured = capture(function, tokens(), 0.5, {"a": torch.ones(1), "b": torch.zeros(1)}, sizes=sizes)
    old, new = placeholders(captured.dynamo), placeholders(captured.canonical)
    assert [n.name for n in old] == [n.name for n in new]
    assert [n.target for n in old] == [n.target for n in new]
    for before, after in zip(old, new, strict=True):
        kept = set(before.meta) - {"grapharg"}  # which Dynamo takes away itself
        assert all(after.meta[field] is before.meta[field] for field in kept)
        if isinstance(before.meta["example_value"], torch.Tensor):
            assert after.meta["val"].shape == before.meta["example_value"].shape
            assert after._dynamo_source is before._dynamo_source


def test_the_meta_of_the_graph_is_kept():
    captured = capture(lambda x: x + 1, tokens())
    assert set(captured.dynamo.meta) <= set(captured.canonical.meta)


@SIZES
def test_all_calls_are_aten_and_know_their_line_and_module(sizes):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x).relu() @ x.transpose(1, 2)

    captured = capture(Model(), tokens(), sizes=sizes)
    calls = [n for n in captured.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    assert all(n.op == "call_function" for n in calls)
    linear = captured.nodes(aten.linear)[0]
    assert "inner" in list(linear.meta["nn_module_stack"].values())[-1][0]
    assert "test_canonicalize.py" in captured.nodes(aten.relu)[0].meta["stack_trace"]


def test_a_cast_to_the_type_of_another_tensor_does_not_read_it():
    def function(x):
        return torch.ones(3).half().type_as(x), torch.Tensor.type_as(torch.ones(5), x), x.type_as(x)

    captured = capture(function, tokens())
    assert captured.nodes(aten.type_as) == []
    casts = captured.nodes(aten.to.dtype)[-3:]
    assert [node.args[1] for node in casts] == [torch.float32] * 3
    [x] = [node for node in placeholders(captured.canonical) if isinstance(node.meta["val"], torch.Tensor)]
    assert list(x.users) == [casts[-1]]


def test_inputs_that_the_model_keeps_are_told_from_those_handed_in():
    model = torch.nn.BatchNorm1d(13).eval()
    model.handed_over = torch.ones(16)
    captured = capture(lambda x: model(x) * model.handed_over, tokens())
    kept = {node.name for node in placeholders(captured.canonical) if is_owned(node)}
    assert len(kept) == 4, "weight, bias, running mean and variance"
    assert not any("handed_over" in name or "_x_" in name for name in kept)


def test_multi_head_attention_opens_into_one_sdpa():
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def function(x):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return module(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]

    captured = capture(function, tokens())
    assert len(captured.nodes(aten.scaled_dot_product_attention)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_floats_arrive_by_item(training):
    w = weights()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.scale, self.rate = 1e-5, 0.37, 0.0

        def forward(self, x, factor):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return F.dropout(attend(x * factor, w, scale=self.scale), self.rate, self.training)

    model = Model().train(training)
    captured = capture(model, tokens(), 0.75, sizes="all")
    assert only(captured.found()).proved.attention.scale == pytest.approx(0.37)


class Doubled(torch.autograd.Function):
    """An identity with a gradient of its own: what a re-trace of the forward would lose."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 30.0 + x * 0


def _gradients(function, x):
    x = x.clone().requires_grad_()
    function(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_custom_gradient_is_kept(inner, sparse_calls):
    w = weights()

    def function(x):
        return attend(Doubled.apply(x), w)

    expected = _gradients(function, tokens())
    got = _gradients(sparse(function, inner=inner), tokens())
    assert sparse_calls
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_a_custom_function_stays_one_opaque_call():
    w = weights()
    captured = capture(lambda x: attend(Doubled.apply(x), w), tokens().requires_grad_())
    assert [node.target.name() for node in opaque(captured)] == ["autograd_function_apply"]


class Layers(torch.nn.Module):
    """Two attentions in checkpointed bodies, one outside."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.ParameterList([torch.nn.Parameter(x) for x in weights()])

    def layer(self, x):
        out = attend(x, tuple(self.w))
        return x + out.transpose(1, 2).flatten(2)[..., :16]

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=False)
        return self.layer(x)


@pytest.mark.parametrize("sizes", ["dynamic", "static"])
def test_checkpointed_bodies_are_canonical_and_stay_shut(sizes):
    captured = capture(Layers(), tokens().requires_grad_(), sizes=sizes)
    nodes = opaque(captured)
    assert [node.target for node in nodes] == [_compat.tag_activation_checkpoint] * 2
    assert len(captured.nodes(aten.scaled_dot_product_attention)) == 1
    for node in nodes:
        body = getattr(captured.canonical, node.args[0].target)
        assert all(n.op in ("placeholder", "output", "get_attr", "call_function") for n in body.graph.nodes)
        targets = [getattr(n.target, "overloadpacket", None) for n in body.graph.nodes]
        assert targets.count(aten.scaled_dot_product_attention) == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpointing_recomputes_sparse_attention_and_keeps_gradients(inner, sparse_calls):
    model = Layers()
    model(tokens()).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fast = sparse(model, inner=inner)
    loss = fast(tokens()).square().sum()
    forward = len(sparse_calls)
    loss.backward()
    assert forward == 3
    # AOTAutograd keeps what the backward pass needs at once: the last body is not computed again.
    assert len(sparse_calls) == {"eager": 5, "aot_eager": 4}[inner]
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-3, rtol=1e-4)


class _Cached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.ParameterList([torch.nn.Parameter(x) for x in weights()])
        self.register_buffer("keys", torch.zeros(3, 2, 20, 8))

    def forward(self, x):
        q, k, v = project(x, *self.w)
        self.keys[: x.shape[0], :, : x.shape[1]] = k
        k = self.keys[: x.shape[0], :, : x.shape[1]]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_gradients_reach_keys_that_are_written_to_a_cache():
    """Dynamo's own value of the cache requires gradients after its trace; the cache that comes in does not."""
    grads = []
    for compiled in (False, True):
        model = _Cached()
        run = torch.compile(model, backend=lambda gm, _: canonicalize(gm)) if compiled else model
        run(tokens()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_flex_attention_stays_one_opaque_call_that_knows_its_line():
    w = weights(4, 4)

    def score(value, batch, head, query, key):
        return torch.where(query >= key, value, -torch.inf)

    def function(x):
        return flex_attention(*project(x, *w), score_mod=score) + attend(x, w)

    captured = capture(function, tokens(2, 16), sizes="static")
    [node] = opaque(captured)
    assert node.target is _compat.flex_attention
    assert "test_canonicalize.py" in node.meta["stack_trace"]
    assert [entry.proved is None for entry in captured.found()] == [True, False]


def _region(context):
    w = weights()

    def function(x):
        with context():
            shift = x * 3.0
            attended = attend(shift, w)
        return attended.sum() * 0 + attend(x, w) + shift.mean()

    return function


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_no_grad_region_is_kept(inner):
    function = _region(torch.no_grad)
    x = tokens()
    torch.testing.assert_close(
        _gradients(sparse(function, inner=inner), x), _gradients(function, x), atol=1e-4, rtol=1e-4
    )


def test_an_inference_mode_region_is_kept():
    function = _region(torch.inference_mode)
    with torch.no_grad():
        captured = capture(function, tokens())
    names = [getattr(n.target, "__name__", "") for n in captured.graph.nodes]
    assert names.count("_enter_inference_mode") == names.count("_exit_inference_mode") == 1
    assert names.index("_enter_inference_mode") < names.index("_exit_inference_mode")

    def escaped(x):
        with torch.inference_mode():
            return attend(x, weights())

    assert sparse(escaped)(tokens()).is_inference() is escaped(tokens()).is_inference() is True


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_autocast_region_is_kept(inner, sparse_calls):
    function = _region(functools.partial(torch.autocast, "cpu", torch.bfloat16))
    half = lambda x: _half(x, attend)  # noqa: E731
    got, expected = sparse(function, inner=inner)(tokens()), function(tokens())
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    got, expected = sparse(half, inner=inner)(tokens()), half(tokens())
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
    assert len(sparse_calls) >= 3


def _half(x, attend):
    with torch.autocast("cpu", torch.bfloat16):
        return attend(x, weights())


def _two(tensor):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(tensor, tensor.clone())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_calls_on_a_tensor_subclass_stay_as_they_are_around_a_sparse_site(inner, sparse_calls):
    def function(x, w, scale):
        return attend(x, w), (scale * 2).chunk(2)[1]

    scale = _two(torch.arange(4.0))
    expected = function(tokens(), weights(), scale)
    dense = torch.compile(function, backend="eager")(tokens(), weights(), scale)
    got = sparse(function, inner=inner)(tokens(), weights(), scale)
    assert len(sparse_calls) == 1
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
    assert type(got[1]) is type(dense[1]) is type(scale)
    assert torch.equal(got[1].a, expected[1].a)


def test_attention_on_a_tensor_subclass_itself_is_refused():
    captured = capture(attend, _two(tokens()), weights())
    [found] = detect_attention(captured.canonical.graph)
    assert found.reason is Reason.TENSOR_SUBCLASS
    assert "TwoTensor" in found.detail


@SIZES
def test_mutation_of_an_input_is_kept(sizes):
    cache = torch.zeros(3, 20, 16)

    def function(x, cache):
        cache[:, 2 : 2 + x.shape[1]] = x
        return cache.sum(1) + x.sum(1)

    capture(function, tokens(), cache, sizes=sizes)
    mine, theirs = cache.clone(), cache.clone()
    torch._dynamo.reset()
    sparse(function)(tokens(), mine)
    function(tokens(), theirs)
    torch.testing.assert_close(mine, theirs)


def test_the_model_is_not_changed_by_canonicalizing():
    captured = capture(Layers(), tokens().requires_grad_())
    text = captured.dynamo.print_readable(print_output=False)
    canonicalize(captured.dynamo)
    assert captured.dynamo.print_readable(print_output=False) == text
