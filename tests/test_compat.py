"""Canaries: each private name of torch in ``_compat`` still does what the package relies on."""

import copy
import inspect
import operator

import pytest
import torch
from torch import nn

from msa_compile import _compat


def capture(function, *args):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append((gm, _compat.TracingContext.try_get()))
        return gm.forward

    _compat.compile_isolated(function, backend)(*args)
    return graphs


def test_fake_copy_mode_copies_onto_fake_tensors_and_leaves_the_original():
    model = nn.Linear(3, 5)
    mode = _compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=_compat.ShapeEnv())
    with _compat.FakeCopyMode(mode):
        twin, tensor = copy.deepcopy((model, torch.zeros(2, 3)))
    assert isinstance(twin.weight, nn.Parameter)
    assert isinstance(twin.weight, _compat.FakeTensor)
    assert isinstance(tensor, _compat.FakeTensor)
    assert type(model.weight) is nn.Parameter
    with mode:
        assert twin(tensor).shape == (2, 5)


def test_tracing_context_has_the_fake_mode_inside_a_backend_and_none_outside():
    [(_, context)] = capture(lambda x: x + 1, torch.zeros(3))
    assert isinstance(context.fake_mode, _compat.FakeTensorMode)
    assert _compat.TracingContext.try_get() is None


def test_graph_inputs_are_the_very_parameters_with_their_source():
    model = nn.Sequential(nn.Linear(3, 3))
    inputs = []

    def backend(gm, example_inputs):
        inputs.extend(_compat.graph_inputs(gm))  # Dynamo forgets the values after the backend
        return gm.forward

    _compat.compile_isolated(lambda module, x: module(x), backend)(model, torch.zeros(2, 3))
    assert "L['module']._modules['0']._parameters['weight']" in dict(inputs)
    assert any(value is model[0].weight for _, value in inputs)


def test_restore_paths_names_the_module_of_a_frame_after_a_graph_break():
    class Inner(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x.sin()

    model = nn.Sequential(nn.Identity(), nn.Sequential(Inner(3, 3)))
    stacks = []

    def backend(gm, example_inputs):
        _compat.restore_paths(gm, model)
        for node in gm.graph.nodes:
            stacks.extend(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
        return gm.forward

    _compat.compile_isolated(lambda module, x: module(x), backend)(model, torch.zeros(2, 3))
    assert any(path.endswith("].1.0") for path in stacks), stacks


def test_proxy_mode_is_there_inside_make_fx_alone_and_can_be_disabled():
    seen = []

    def function(x):
        seen.append(_compat.get_proxy_mode())
        with _compat.disable_proxy_modes_tracing():
            seen.append(_compat.get_proxy_mode())
            hidden = x + 1
        return x * hidden.shape[0]

    gm = _compat.make_fx(function, pre_dispatch=True)(torch.zeros(3))
    assert seen[0] is not None
    assert seen[1] is None
    assert _compat.get_proxy_mode() is None
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [torch.ops.aten.mul.Tensor]


def test_track_tensor_tree_gives_a_result_its_own_proxy():
    example = torch.empty(3)

    def function(x):
        tracer = _compat.get_proxy_mode().tracer
        proxy = tracer.create_proxy("call_function", operator.neg, (tracer.unwrap_proxy(x),), {})
        return _compat.track_tensor_tree(example, proxy, constant=None, tracer=tracer) + 1

    gm = _compat.make_fx(function, pre_dispatch=True)(torch.zeros(3))
    [neg] = [node for node in gm.graph.nodes if node.target is operator.neg]
    assert [user.target for user in neg.users] == [torch.ops.aten.add.Tensor]


def test_checkpointing_is_a_higher_order_operator_with_its_body_as_a_module():
    assert isinstance(_compat.tag_activation_checkpoint, _compat.HigherOrderOperator)

    def function(x):
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)

    [(gm, _)] = capture(function, torch.zeros(3, requires_grad=True))
    calls = [node for node in gm.graph.nodes if node.target is _compat.tag_activation_checkpoint]
    assert len(calls) == 1
    assert isinstance(getattr(gm, calls[0].args[0].target), torch.fx.GraphModule)


def test_a_vmap_is_written_out_between_its_increment_and_decrement():
    function = torch.vmap(torch.vmap(torch.sin))
    [(gm, _)] = capture(function, torch.zeros(3, 2))
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert targets[0] is _compat.lazy_load_decompositions
    entered = [n for n, target in enumerate(targets) if target is _compat.vmap_increment_nesting]
    left = [n for n, target in enumerate(targets) if target is _compat.vmap_decrement_nesting]
    assert len(entered) == len(left) == 2
    assert max(entered) < min(left)
    assert set(targets) - {torch.sin} == set(_compat.VMAP_STEPS)
    assert {step.__module__ for step in _compat.VMAP_STEPS} == {"torch._functorch.predispatch"}
    levels = []
    torch.vmap(lambda x: levels.append(_compat.maybe_current_level()) or x)(torch.zeros(3))
    assert [*levels, _compat.maybe_current_level()] == [1, None]


def test_flex_attention_is_a_higher_order_operator_with_its_mask_last_of_the_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def function(q):
        block_mask = create_block_mask(lambda b, h, q, k: q >= k + hidden, None, None, 16, 16, device="cpu")
        return flex_attention(q, q, q, block_mask=block_mask)

    hidden = torch.zeros((), dtype=torch.int64)
    [(gm, _)] = capture(function, torch.zeros(1, 1, 16, 16))
    [node] = [node for node in gm.graph.nodes if node.target is _compat.flex_attention]
    query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = node.args
    assert query is key is value
    assert scale == 0.25
    assert isinstance(getattr(gm, score_mod.target), torch.fx.GraphModule)
    assert isinstance(getattr(gm, block_mask[-1].target), torch.fx.GraphModule)
    assert score_buffers == ()
    assert len(mask_buffers) == 1


def test_an_aten_call_is_an_op_overload():
    assert isinstance(torch.ops.aten.add.Tensor, _compat.OpOverload)


def test_backend_failures_carry_the_exception_and_lookup_finds_inner_compilers():
    def backend(gm, example_inputs):
        raise ValueError("ours")

    with pytest.raises(_compat.BackendCompilerFailed) as caught:
        torch.compile(torch.sin, backend=backend)(torch.zeros(3))
    assert isinstance(caught.value.inner_exception, ValueError)
    assert callable(_compat.lookup_backend("aot_eager"))
    assert _compat.lookup_backend("msa").__module__ == "msa_compile.backend"


def test_wrapper_subclasses_are_told_from_plain_tensors():
    from torch.testing._internal.two_tensor import TwoTensor

    assert _compat.is_traceable_wrapper_subclass(TwoTensor(torch.zeros(2), torch.zeros(2)))
    assert not _compat.is_traceable_wrapper_subclass(torch.zeros(2))


def test_a_compiled_module_has_its_class():
    assert isinstance(torch.compile(nn.Linear(2, 2), backend="eager"), _compat.compiled_module_class())


def test_compile_isolated_keeps_the_limit_of_one_function_from_another():
    def many(x, number):
        return x + number

    def use_up(compiled):
        graphs = []

        def backend(gm, example_inputs):
            graphs.append(gm)
            return gm.forward

        function = compiled(backend)
        for size in range(2, 14):
            with torch.no_grad():
                function(torch.zeros(size, *[1] * (size - 2)), 1)  # another rank, another graph
        return len(graphs)

    limit = torch._dynamo.config.recompile_limit
    assert limit < 12, "or this test shows nothing"
    assert use_up(lambda backend: torch.compile(many, backend=backend)) == limit
    for _ in range(2):
        assert use_up(lambda backend: _compat.compile_isolated(many, backend)) == 12


def test_a_source_of_a_constant_has_a_name_and_a_restart_is_no_ordinary_failure():
    # AOTAutograd asks each buffer of a graph for its source, and Dynamo restarts a frame on this exception.
    source = _compat.ConstantSource("_tensor_constant0")
    name = source.name
    assert (name() if callable(name) else name) == "_tensor_constant0"
    assert issubclass(_compat.TensorifyScalarRestartAnalysis, Exception)
    assert not issubclass(_compat.TensorifyScalarRestartAnalysis, _compat.BackendCompilerFailed)


def test_the_source_of_an_input_tells_whether_a_module_keeps_it():
    model = nn.BatchNorm1d(3).eval()
    [(gm, _)] = capture(lambda module, x: module(x), model, torch.zeros(2, 3))
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    kept = [_compat.is_kept_by_module(getattr(node, "_dynamo_source", None)) for node in inputs]
    assert kept.count(True) == 4, "weight, bias, running mean and variance"
    assert kept.count(False) == len(inputs) - 4 >= 1
    assert not _compat.is_kept_by_module(None)


def test_export_makes_regions_bodies_of_operators_and_a_trace_makes_them_calls():
    class Regions(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                x = x.sin()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    x = torch.zeros(3, 3)
    program = torch.export.export(Regions(), (x,))
    nodes = {node.target: node for node in program.graph.nodes}
    enabled, body, _ = nodes[_compat.wrap_with_set_grad_enabled].args
    assert enabled is False
    assert isinstance(getattr(program.graph_module, body.target), torch.fx.GraphModule)
    *mode, body, _ = nodes[_compat.wrap_with_autocast].args
    assert mode[:3] == ["cpu", torch.bfloat16, True]
    assert len(mode) == 4
    assert isinstance(getattr(program.graph_module, body.target), torch.fx.GraphModule)

    traced = _compat.make_fx(Regions(), pre_dispatch=True)(x)
    calls = [(node.target, node.args) for node in traced.graph.nodes if node.op == "call_function"]
    targets = [target for target, _ in calls]
    assert [args for target, args in calls if target is _compat.set_grad_enabled] == [(False,), (True,)]
    assert len(calls[targets.index(_compat.enter_autocast)][1]) == 4
    assert _compat.exit_autocast in targets


def test_a_hint_of_a_dynamic_size_can_be_taken_back():
    tensor = torch.zeros(3, 4)
    torch._dynamo.maybe_mark_dynamic(tensor, 1)
    assert getattr(tensor, _compat.WEAK_DYNAMIC) == {1}


def test_training_of_a_subclass_is_told_from_everything_else():
    from torch.testing._internal.two_tensor import TwoTensor

    model, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert _compat.trains_subclasses(model)
    assert not _compat.trains_subclasses(plain)
    with torch.no_grad():
        assert not _compat.trains_subclasses(model)
    assert not _compat.trains_subclasses(model.requires_grad_(False))


def test_a_weak_tensor_dictionary_knows_the_object_and_lets_it_go():
    states = _compat.WeakTensorKeyDictionary()
    one, equal = torch.zeros(2), torch.zeros(2)
    states[one] = "state"
    assert (states.get(one), states.get(equal), states.get(one.view(2))) == ("state", None, None)
    del one
    assert len(states) == 0


def test_a_cache_of_layers_asks_each_of_them():
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    from msa_compile.export.caches import GrowingLayer

    layers = [GrowingLayer(torch.zeros(1, 2, length, 4), torch.zeros(1, 2, length, 4)) for length in (3, 5)]
    cache = _compat.cache_of(layers)
    fresh = torch.ones(1, 2, 2, 4)
    keys, values = cache.update(fresh, fresh, 1)
    assert keys is layers[1].keys
    assert values.shape == (1, 2, 7, 4)


def test_inductor_has_the_settings_that_a_package_is_compiled_with():
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    assert config.aot_inductor.custom_ops_to_c_shims == {}
    assert config.aot_inductor.custom_op_libs is None
    assert {"package_path", "inductor_configs"} <= set(inspect.signature(aoti_compile_and_package).parameters)
    assert callable(aoti_load_package)


def test_operators_that_are_made_of_others_are_decomposed_one_by_one():
    table = _compat.composite_decompositions()
    matmul = torch.ops.aten.matmul.default
    assert matmul in table
    assert torch.ops.aten.mm.default not in table
    assert torch.equal(table[matmul](torch.ones(2, 3), torch.eye(3)), torch.ones(2, 3))
    found = _compat.get_decompositions([torch.ops.aten.masked_fill, torch.ops.aten.t])
    assert {torch.ops.aten.masked_fill.Scalar, torch.ops.aten.t.default} <= set(found)
