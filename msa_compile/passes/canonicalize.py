"""Re-trace a Dynamo graph to pre-dispatch ATen, the one IR that detection and rewriting know.

The trace keeps node metadata, runs above autograd (so training works), and leaves every higher-order operator as an
opaque call: executing one here would inline it and lose custom gradients or checkpointing. Bodies that may hold
attention are re-traced apart. Calls on tensor subclasses stay opaque too, see ``keep_subclasses``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from msa_compile import _compat
from msa_compile.errors import CaptureError
from msa_compile.passes.flatten_vmap import flatten_vmap
from msa_compile.passes.graph_facts import OWNED, TRAINED, is_op, tensor_value
from msa_compile.passes.keep_subclasses import Kept, holds_subclass, must_keep, unkept
from msa_compile.passes.spell_block_masks import spell_block_masks

log = logging.getLogger(__name__)

# Bodies of these run exactly once, in place, so a site inside one is a site of the model.
TRANSPARENT_BODIES = (_compat.tag_activation_checkpoint,)

_INFERENCE_MODE = (torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode)


def canonicalize(gm: GraphModule) -> GraphModule:
    """The pre-dispatch ATen form of ``gm``, with the same placeholders in the same order.

    Args:
        gm: A graph from Dynamo; each placeholder has ``meta["example_value"]``.

    Raises:
        CaptureError: If the trace fails.
    """
    fake_mode = _fake_mode_of(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = [_input(node, fake_mode) for node in placeholders]
    try:
        with fake_mode:
            flat = flatten_vmap(gm, lambda node: _refake(node.meta.get("example_value"), fake_mode))
        retracer = _Retracer(flat, fake_mode)
        with fake_mode, fx_traceback.preserve_node_meta():
            traced = _compat.make_fx(_as_function(retracer), pre_dispatch=True)(*inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the captured graph could not be re-traced to ATen: {type(error).__name__}: {error}. "
            "Report this with the model's code; `msa_compile.unsparsify(model)` gives the dense model back."
        ) from error
    untie_types(traced)
    spell_block_masks(traced, fake_mode)
    traced.meta.update(gm.meta)
    _copy_sources(gm, traced)
    traced_placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for old, new, given in zip(placeholders, traced_placeholders, inputs, strict=True):
        # AOTAutograd reads sources and static-address marks from here.
        new.meta = {
            **old.meta,
            "val": new.meta.get("val", old.meta.get("example_value")),
            OWNED: _compat.is_kept_by_module(getattr(old, "_dynamo_source", None)),
            # The value in the trace is a detached one.
            TRAINED: isinstance(given, torch.Tensor) and given.requires_grad,
        }
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.target = old.target
        new._rename(old.name)
    for name in retracer.transparent_bodies:
        body = getattr(gm, name)
        setattr(traced, retracer.renamed[name], canonicalize(body))
    traced.recompile()
    return traced


def untie_types(gm: GraphModule) -> None:
    """Spell ``a.type_as(b)`` without ``b``: only its dtype matters, and it would tie a mask to the activations."""
    for node in gm.graph.nodes:
        if is_op(node, torch.ops.aten.type_as):
            value, other = tensor_value(node.args[0]), tensor_value(node.args[1])
            if value is not None and other is not None and value.device == other.device:
                node.target, node.args = torch.ops.aten.to.dtype, (node.args[0], other.dtype)


def _copy_sources(gm: GraphModule, traced: GraphModule) -> None:
    """Tell AOTAutograd where inputs come from, as Dynamo told it; constants of the trace come from nowhere."""
    if hasattr(gm, "_source_to_user_stacks"):
        traced._source_to_user_stacks = gm._source_to_user_stacks
    if hasattr(gm, "_param_name_to_source"):
        constants = {name: _compat.ConstantSource(name) for name, _ in traced.named_buffers()}
        traced._param_name_to_source = {**constants, **gm._param_name_to_source}  # type: ignore[assignment, dict-item]


def _as_function(interpreter: Interpreter) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return unkept(interpreter.run(*args))

    return run


def _fake_mode_of(gm: GraphModule) -> _compat.FakeTensorMode:
    context = _compat.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, _compat.FakeTensor):
            return value.fake_mode
    return _compat.FakeTensorMode(allow_non_fake_inputs=True)


def _input(node: Node, fake_mode: _compat.FakeTensorMode) -> Any:
    """What stands for a placeholder in the re-trace."""
    value = node.meta.get("example_value")
    if holds_subclass(value):
        return Kept(value)
    value = _refake(value, fake_mode)
    given = getattr(node.meta.get("grapharg"), "example", None)
    # Dynamo's own value has seen the graph run: a cache that a projection is written to requires gradients afterwards.
    return value.requires_grad_(given.requires_grad) if isinstance(given, torch.Tensor) else value


def _refake(value: Any, fake_mode: _compat.FakeTensorMode) -> Any:
    """``value`` in ``fake_mode``: Dynamo's example values belong to another mode of the same shape environment."""
    if not isinstance(value, torch.Tensor):
        return value
    with fake_mode, _compat.disable_proxy_modes_tracing():
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return fake.requires_grad_(value.requires_grad) if value.requires_grad else fake


class _Retracer(Interpreter):
    """Runs a Dynamo graph under ``make_fx``."""

    def __init__(self, gm: GraphModule, fake_mode: _compat.FakeTensorMode) -> None:
        super().__init__(gm)
        self.fake_mode = fake_mode
        self.transparent_bodies: list[str] = []
        self.renamed: dict[str, str] = {}
        self._inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self._node = n
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if isinstance(n.target, _compat.HigherOrderOperator) or must_keep(n, args, kwargs):
            with fx_traceback.set_current_meta(n):
                return self._emit_opaque(n, args, kwargs)
        if n.op == "call_function" and n.target in _INFERENCE_MODE:
            # Executed here, the region would be lost from the trace.
            return _proxy_mode().tracer.create_proxy("call_function", n.target, args, kwargs)
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input; one that is kept learns its name, by which alone the trace knows it."""
        value = super().placeholder(target, args, kwargs)
        if isinstance(value, Kept):
            tracer = _proxy_mode().tracer
            inputs = [node for node in tracer.graph.nodes if node.op == "placeholder"]
            value.proxy = torch.fx.Proxy(inputs[self._inputs.index(self._node)], tracer)
            value.proxy.node.meta["val"] = value.example
        return value

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A method of a torch-level graph, with one whose result Dynamo may know."""
        if target == "item" and self._node is not None and isinstance(args[0], torch.Tensor):
            # dynamic=True hands Python floats in as 0-d tensors; Dynamo knows the value of their .item().
            known = self._node.meta.get("example_value")
            if known is not None:
                args[0].item_memo = known  # type: ignore[attr-defined]
        return super().call_method(target, args, kwargs)

    def _emit_opaque(self, node: Node, args: Any, kwargs: Any) -> Any:
        mode = _proxy_mode()
        tracer = mode.tracer
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                continue
            name = str(source.target)
            body = getattr(self.module, name, None)
            if isinstance(body, GraphModule) and name not in self.renamed:
                self.renamed[name] = name
                tracer.root.register_module(name, body)
                if node.target in TRANSPARENT_BODIES:
                    self.transparent_bodies.append(name)
        proxy_args, proxy_kwargs = pytree.tree_map(tracer.unwrap_proxy, unkept((tuple(args), dict(kwargs))))
        out = tracer.create_proxy(node.op, node.target, proxy_args, proxy_kwargs)
        example = node.meta.get("example_value")
        if holds_subclass(example):
            out.node.meta["val"] = example
            return Kept(example, out)
        example = pytree.tree_map(lambda value: _refake(value, self.fake_mode), example)
        return _compat.track_tensor_tree(example, out, constant=None, tracer=tracer)


def _proxy_mode() -> Any:
    mode = _compat.get_proxy_mode()
    assert mode is not None, "re-tracing runs under make_fx"
    return mode
