"""The ``"msa"`` backend: what ``torch.compile`` calls with each captured graph."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from msa_compile._compat import (
    TensorifyScalarRestartAnalysis,
    graphs_in,
    lookup_backend,
    restore_paths,
    set_grad_enabled,
)
from msa_compile.config import MSAConfig
from msa_compile.errors import CaptureError, ConfigError, MSAError, SiteRefusedError, UnknownOptionError
from msa_compile.index_keys import IndexKeys
from msa_compile.indexer import IndexBranch
from msa_compile.markers import marker_nodes
from msa_compile.observed import Observer, SiteCall
from msa_compile.passes.insert_index_branch import BRANCH
from msa_compile.passes.pipeline import PassResult, run_passes
from msa_compile.passes.rewrite_attention import SITE
from msa_compile.records import GraphRecord, Reason, Site

log = logging.getLogger(__name__)

_numbers = itertools.count()
_ALWAYS_DENSE = 2**62
_BUDGET = ("topk", "local_blocks", "sink_blocks", "candidates")
INNER_COMPILERS = ("inductor", "aot_eager", "eager")


class MSABackend:
    """Rewrites captured graphs and hands them to an inner compiler.

    Only errors of this package leave it: Dynamo turns many others into silent graph breaks.

    Args:
        config: What the user asks for.
        inner: ``"inductor"``, or ``"aot_eager"`` and ``"eager"`` for debugging.
        mode: Mode of the inner compiler, ``torch.compile``'s own names; Inductor only.
        model: The model whose graphs these are, so that a graph that starts inside it gets the right module paths.
        windows: Sliding windows known of its sites.
        expected: Names of the sites that were found sparse; one that is dense in some graph is said and counted.
    """

    def __init__(
        self,
        config: MSAConfig,
        inner: str = "inductor",
        mode: str | None = None,
        *,
        model: nn.Module | None = None,
        windows: dict[str, int] | None = None,
        expected: Collection[str] = (),
    ) -> None:
        self.config = config
        self.inner = check_inner(inner)
        self.mode = mode
        self.model = model
        self.windows = {} if windows is None else windows
        self.expected = expected
        self.records: list[GraphRecord] = []
        self.dense_calls: Counter[str] = Counter()
        self.number = next(_numbers)
        self.index_keys = IndexKeys()
        self.index_losses: dict[str, Tensor] = {}
        self.learns = False
        self._said: set[str] = set()
        if mode not in (None, "default") and inner != "inductor":
            raise UnknownOptionError(f"mode={mode!r} is a mode of Inductor; the inner compiler is {inner!r}. Drop one.")

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite one graph of Dynamo's and compile it."""
        try:
            if self.model is not None:
                restore_paths(gm, self.model)
            after = self.records[-1].graph_break if self.records else ""
            has_losses = self._has_losses()
            result = run_passes(
                gm,
                self.config,
                self.windows,
                after=after,
                owner=self.number,
                learns=self.learns or has_losses,
                has_losses=has_losses,
            )
            check_strict(result.record.sites, self.config)
            self.records.append(result.record)
            compiled = self._compile(result.module, [*example_inputs, *_index_inputs(result)])
            compiled = self.index_keys.bound(self._collecting(compiled, result.losses), result.bindings)
            return self._counting(compiled, self._turned_dense(gm, result.record))
        except (MSAError, TensorifyScalarRestartAnalysis):  # the latter asks Dynamo to start this frame again
            raise
        except Exception as error:
            log.debug("the msa backend failed", exc_info=True)
            raise CaptureError(
                f"{type(error).__name__} while compiling the sparse graph with {self.inner!r}: {error}. "
                'Try inner="eager" to tell a rewrite problem from a compiler problem.'
            ) from error

    def _has_losses(self) -> bool:
        """Whether index losses are wanted: where somebody trains index branches, and not where they are frozen."""
        if self.model is None or not (self.model.training and torch.is_grad_enabled()):
            return False
        branches = [part for part in self.model.modules() if isinstance(part, IndexBranch) and part.is_used]
        return any(weight.requires_grad for branch in branches for weight in branch.weights())

    def _collecting(self, compiled: Callable[..., Any], losses: Sequence[str]) -> Callable[..., Any]:
        """``compiled`` without the outputs that are index losses, which are kept until the next call of the model."""
        if not losses:
            return compiled

        def run(*args: Any) -> Any:
            outputs = compiled(*args)
            own = len(outputs) - len(losses)
            self.index_losses.update(zip(losses, outputs[own:], strict=True))
            return outputs[:own]

        return run

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.inner == "eager":
            return gm
        if self.inner == "aot_eager":
            compiled: Callable[..., Any] = lookup_backend("aot_eager")(gm, list(example_inputs))
            return compiled
        options = {} if self.mode in (None, "default") else torch._inductor.list_mode_options(self.mode)
        compiled = torch._inductor.compile(gm, list(example_inputs), options=options)
        return compiled

    def _turned_dense(self, gm: GraphModule, record: GraphRecord) -> list[str]:
        """Sites that were found sparse in another graph and are dense in this one, which has erased their markers."""
        marked = {str(node.args[1]) for node in marker_nodes(gm)}
        turned = [
            s
            for s in record.sites
            if s.decision == "dense" and s.name in self.expected and s.name.split(":")[0] in marked
        ]
        for row in turned:
            if row.name not in self._said:
                self._said.add(row.name)
                log.warning(
                    "%s stays DENSE in a graph of this call, although it is sparse in another: %s: %s",
                    row.name or "<root>",
                    row.reason.value if row.reason else "",
                    row.detail,
                )
        return [row.name for row in turned]

    def _counting(self, compiled: Callable[..., Any], turned: list[str]) -> Callable[..., Any]:
        if not turned:
            return compiled

        def count_and_run(*args: Any) -> Any:
            self.dense_calls.update(turned)
            return compiled(*args)

        return count_and_run


class BudgetBackend(MSABackend):
    """Sparse graphs whose budgets change between calls, to try many on one capture; nothing is compiled further.

    Every site is sparse, however short the call, until its budget says otherwise.
    """

    def __init__(self, config: MSAConfig, model: nn.Module, windows: dict[str, int], expected: Collection[str]) -> None:
        every = replace(config, dense_below=0)
        super().__init__(every, "eager", model=model, windows=windows, expected=expected)
        self._graphs: list[GraphModule] = []
        self._budgets: dict[str, int | None] = {}

    def set_budgets(self, budgets: Mapping[str, int | None]) -> None:
        """Give each site its number of blocks, by the path of its owner; ``None`` is dense. The others keep theirs."""
        self._budgets.update(budgets)
        for gm in self._graphs:
            self._apply(gm)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._graphs.append(gm)
        self._apply(gm)
        # The graph's own forward is made anew when a budget changes.
        return lambda *args: gm(*args)

    def _apply(self, gm: GraphModule) -> None:
        for body in graphs_in(gm):
            for node in body.graph.nodes:
                owner = str(node.meta.get(SITE, "")).split(":")[0]
                if SITE in node.meta and owner in self._budgets:
                    topk = self._budgets[owner]
                    below = 0 if topk is not None else _ALWAYS_DENSE
                    node.kwargs = {**node.kwargs, "dense_below": below, "topk": topk or node.kwargs["topk"]}
                    for user in list(node.users):
                        user.kwargs = {**user.kwargs, "dense_below": below}
            body.recompile()


class ObservingBackend(MSABackend):
    """Graphs that show every call of a site with an index branch to an observer; nothing is compiled further.

    They are run without gradients, and have gradients for the index branches alone: what an observer does with them is
    over before the next site is computed.

    Args:
        observer: Called with each call, on the way.
        is_sparse: Whether attention itself selects blocks, by what the branches are now; otherwise it is dense.
    """

    def __init__(
        self,
        config: MSAConfig,
        model: nn.Module,
        windows: dict[str, int],
        expected: Collection[str],
        observer: Observer,
        *,
        is_sparse: bool,
    ) -> None:
        every = replace(config, dense_below=0)
        super().__init__(every, "eager", model=model, windows=windows, expected=expected)
        self.learns = True  # but no losses: the observer makes its own
        self._observer = observer
        self._dense_below = 0 if is_sparse else _ALWAYS_DENSE

    def _has_losses(self) -> bool:
        return False

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for body in graphs_in(gm):
            branches: dict[str, dict[str, Node]] = {}
            for node in body.graph.nodes:
                if BRANCH in node.meta:
                    name, part = node.meta[BRANCH]
                    branches.setdefault(name, {})[part] = node
            for node in [node for node in body.graph.nodes if SITE in node.meta]:
                self._watch(body.graph, node, branches.get(node.meta[SITE]))
            body.recompile()
        return gm

    def _watch(self, graph: Graph, select: Node, branch: Mapping[str, Node] | None) -> None:
        attention = next(node for node in select.users if node.target is torch.ops.msa.block_sparse_attention.default)
        bounds = {name: value for name, value in select.kwargs.items() if name not in (*_BUDGET, "dense_below")}
        budget = {name: select.kwargs[name] for name in _BUDGET}
        factors = {name: attention.kwargs[name] for name in ("scale", "softcap", "sinks")}
        for node in (select, attention):
            node.kwargs = {**node.kwargs, "dense_below": self._dense_below}
        if branch is None:
            return
        with graph.inserting_before(branch["hidden"]):
            graph.call_function(set_grad_enabled, (True,))
        with graph.inserting_before(select):
            graph.call_function(set_grad_enabled, (False,))

        def observe(*operands: Any) -> None:
            self._observer(SiteCall(*operands))

        with graph.inserting_before(attention):
            plain = (branch["hidden"], branch["query"], branch["key"])
            operands = (*plain, *select.args[:2], *attention.args[:3])
            graph.call_function(observe, (select.meta[SITE], *operands, budget, bounds, factors))


def _index_inputs(result: PassResult) -> list[Any]:
    """Fake index keys, for the inputs that the rewrite added at the end."""
    inputs = [node.meta["val"] for node in result.module.graph.nodes if node.op == "placeholder"]
    return inputs[len(inputs) - sum(binding.source is not None for binding in result.bindings) :]


def check_inner(inner: str) -> str:
    """``inner`` if it names an inner compiler.

    Raises:
        ConfigError: If it does not.
    """
    if inner not in INNER_COMPILERS:
        raise ConfigError(f"inner={inner!r} is no inner compiler; choose one of {', '.join(INNER_COMPILERS)}")
    return inner


def check_strict(sites: Sequence[Site], config: MSAConfig) -> None:
    """With ``strict=True``, refuse any site that was asked for and stays dense.

    Raises:
        SiteRefusedError: Naming each site, its reason and what was found.
    """
    if not config.strict:
        return
    refused = [site for site in sites if site.reason not in (None, Reason.EXCLUDED)]
    if refused:
        lines = "\n".join(f"  {s.name}: {s.reason.value if s.reason else ''}: {s.detail}" for s in refused)
        raise SiteRefusedError(
            f"strict=True, and {len(refused)} attention sites cannot be made sparse:\n{lines}\n"
            "Name them in MSAConfig(exclude=...) if they may stay dense, or set strict=False."
        )


def msa(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="msa", options={...})``.

    ``options`` are the fields of :class:`MSAConfig` and ``inner``. ``mode`` is passed on to Inductor. ``dynamic`` and
    ``fullgraph`` belong to Dynamo and act before this backend. Unlike :func:`msa_compile.sparsify`, nothing guards the
    model where this compiled function is not the one that runs it.

    Raises:
        UnknownOptionError: An option that does not exist.
        ConfigError: An option outside its legal range, or `indexer="learned"`.
        CaptureError: A graph that cannot be rewritten.
    """
    given = dict(options or {})
    inner = given.pop("inner", "inductor")
    config = MSAConfig.from_options(given, also=("inner",))
    if config.indexer == "learned":
        raise ConfigError("a learned indexer belongs to a model: use msa_compile.sparsify, which inserts it")
    return MSABackend(config, inner, mode)(gm, example_inputs)
