"""Find a model's attention sites without running it: a fake copy goes through Dynamo, and only records come back."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from msa_compile._compat import (
    BackendCompilerFailed,
    FakeCopyMode,
    FakeTensorMode,
    ShapeEnv,
    compile_isolated,
    restore_paths,
)
from msa_compile.config import MSAConfig
from msa_compile.errors import CaptureError, ExampleInputsError, MSAError, NothingToSparsifyError
from msa_compile.indexer import INDEXER, IndexBranch, insert_index_branch
from msa_compile.markers import install_markers, marker_nodes, remove_markers, tag_frames
from msa_compile.passes.pipeline import run_passes
from msa_compile.records import GraphRecord, Site
from msa_compile.runtime import door_of, fresh_trampoline, mark_dynamic

log = logging.getLogger(__name__)

# Lengths of dummy inputs: primes, so that no other size of a model equals one.
_DUMMY_LENGTHS = (131, 521, 1031, 2053, 4099, 8209)


@dataclass(frozen=True)
class CallInputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Discovery:
    """What is known of a model's sites.

    Attributes:
        records: One for each captured graph.
        windows: Sliding windows of sites, by name.
        carriers: For each owner of a sparse site, the module that carries its marker.
    """

    records: tuple[GraphRecord, ...] = ()
    windows: Mapping[str, int] = field(default_factory=dict)
    carriers: Mapping[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """The rows of all graphs."""
        return [site for record in self.records for site in record.sites]


def discover(model: nn.Module, inputs: CallInputs, config: MSAConfig, windows: Mapping[str, int]) -> Discovery:
    """What detection finds when ``model`` is called with ``inputs``.

    Neither the model nor the arguments are touched: both are copied onto fake tensors, which have shapes but no data,
    so a call costs no memory and no arithmetic, and a cache in the arguments stays as it was.

    Raises:
        ExampleInputsError: If ``model.forward`` does not take these arguments.
        CaptureError: If the model cannot be copied or captured on fake tensors.
    """
    _check_signature(model, inputs)
    records: list[GraphRecord] = []
    carriers: dict[str, str] = {}
    found_windows = dict(windows)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    try:
        with FakeCopyMode(fake_mode):
            fake_model, args, kwargs = copy.deepcopy((model, tuple(inputs.args), dict(inputs.kwargs)))

        def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            restore_paths(gm, fake_model)
            marked = [str(node.args[1]) for node in marker_nodes(gm)]
            after = records[-1].graph_break if records else ""
            found = run_passes(gm, config, found_windows, after=after, rewrite=False).record
            records.append(found)
            for owner in sparse_owners(found.sites):
                carriers.setdefault(owner, carrier_of(owner, marked, taken=carriers.values()))
            return gm.forward  # type: ignore[no-any-return]

        mark_dynamic((args, kwargs))
        with fake_mode, torch.random.fork_rng(devices=[]):
            mark_every_module(fake_model)
            door = door_of(fake_model)
            # A forward that hangs on the instance belongs to the copy as well.
            original = fake_model.__dict__.get("forward") if door is None else door.original
            compile_isolated(fresh_trampoline(original), record)(fake_model, *args, **kwargs)
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, MSAError):
            raise failure.inner_exception from failure
        raise CaptureError(f"the model could not be captured: {failure}") from failure
    except MSAError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model could not be captured on fake tensors: {type(error).__name__}: {error}. If a call of the model "
            "with these inputs works, sparsify it without example_inputs: the sites are then found at the first call."
        ) from error
    return Discovery(tuple(records), found_windows, carriers)


def as_they_select(model: nn.Module, discovery: Discovery) -> Discovery:
    """What was found, where rows say that a site selects by a learned indexer only if its module has one in use."""
    records = tuple(
        replace(record, sites=tuple(_as_it_selects(model, row) for row in record.sites)) for record in discovery.records
    )
    return replace(discovery, records=records)


def _as_it_selects(model: nn.Module, row: Site) -> Site:
    if row.indexer != "learned":
        return row
    owner = model.get_submodule(row.name)
    branch = owner._modules.get(INDEXER)
    if isinstance(branch, IndexBranch) and branch.is_used:
        return row
    why = "its index branch did not pass its gate" if isinstance(branch, IndexBranch) else _why_none(owner)
    detail = f"{row.detail}; scored with keys: {why}" if row.detail else f"scored with keys: {why}"
    return replace(row, indexer="keys", detail=detail)


def _why_none(owner: nn.Module) -> str:
    if hasattr(owner, INDEXER):
        return f'its module has an attribute of its own that is named "{INDEXER}", as a branch is; rename it'
    return "its module has no weights of its own"


def _check_signature(model: nn.Module, inputs: CallInputs) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"{type(model).__name__}.forward cannot be called with the given inputs: {error}. "
            f"Its signature is {signature}."
        ) from error


def mark_every_module(model: nn.Module) -> None:
    """A marker on each module of a copy: it tells which call belongs to which graph."""
    remove_markers(model)
    tag_frames(model)
    paths = [path for path, module in model.named_modules() if not path or module._modules or module._parameters]
    install_markers(model, {path: path for path in paths})


def carrier_of(owner: str, marked: Sequence[str], taken: Collection[str]) -> str:
    """The module to carry the marker of ``owner``: itself, or one inside it that the graph of the attention calls."""
    inside = [path for path in marked if path.startswith(f"{owner}." if owner else "") and path not in taken]
    return owner if owner in marked or not inside else inside[0]


def discover_first(
    model: nn.Module, candidates: Sequence[CallInputs], config: MSAConfig, windows: Mapping[str, int]
) -> Discovery:
    """What is found with the first inputs that the model accepts; the error of the last ones otherwise."""
    for inputs in candidates[:-1]:
        with contextlib.suppress(CaptureError, ExampleInputsError):
            return discover(model, inputs, config, windows)
    return discover(model, candidates[-1], config, windows)


def sparse_owners(sites: Sequence[Site]) -> list[str]:
    """Paths of the modules that own a sparse site."""
    return list(dict.fromkeys(site.name.split(":")[0] for site in sites if site.decision == "sparse"))


def insert_index_branches(model: nn.Module, discovery: Discovery, *, is_forced: bool = True) -> list[nn.Module]:
    """Give each site for which a learned indexer was proved an index branch.

    Args:
        model: The model.
        discovery: What was found in it, with learned indexers planned.
        is_forced: Whether branches are used as they are; a warning says so where they are not trained.

    Returns:
        The modules that have one now and had none.
    """
    untrained = 0
    inserted = []
    for row in discovery.sites:
        if row.indexer != "learned" or row.name not in discovery.carriers:
            continue
        owner = model.get_submodule(row.name)
        is_new = INDEXER not in owner._modules
        sizes = (row.hidden_size, row.key_value_heads, row.head_dim)
        if not insert_index_branch(owner, *sizes, is_forced=is_forced):
            log.warning(
                "%s cannot have an index branch and scores with keys: %s", row.name or "<root>", _why_none(owner)
            )
            continue
        inserted += [owner] if is_new else []
        untrained += not owner.get_submodule(INDEXER).is_calibrated
    if untrained and is_forced:
        log.warning(
            '%d index branches are not trained, and indexer="learned" selects blocks by them all the same: what the '
            "model says beyond its budget means nothing until they are; msa_compile.calibrate trains them",
            untrained,
        )
    return inserted


def check_any_sparse(records: Sequence[GraphRecord]) -> None:
    """Refuse a model in which nothing can be made sparse.

    Raises:
        NothingToSparsifyError: The message lists what was found.
    """
    sites = [site for record in records for site in record.sites]
    if any(site.decision == "sparse" for site in sites):
        return
    breaks = list(dict.fromkeys(record.graph_break for record in records if record.graph_break))
    broken = "".join(f"\n  graph break: {said}" for said in breaks)
    if not sites:
        raise NothingToSparsifyError(
            "no attention was found: no scaled_dot_product_attention and no softmax between two matrix products in the "
            "captured graph. If the model has attention, a custom kernel or a graph break hides it from capture."
            + broken
        )
    lines = "\n".join(f"  {s.name or '<root>'}: {s.reason.value if s.reason else ''}: {s.detail}" for s in sites)
    raise NothingToSparsifyError(
        f"{len(sites)} attention sites were found and none can be made sparse:\n{lines}{broken}"
    )


def candidate_inputs(model: nn.Module, given: Any) -> list[CallInputs]:
    """Arguments of one call to examine: what the user gave, or the dummy inputs that a transformers model brings.

    The dummy inputs are tried first with a length beyond the windows that the model's config names: only there does a
    sliding window show. No longer than that, because a model that loops over its tokens is captured loop by loop.

    Raises:
        ExampleInputsError: If ``given`` is no dict, tuple or tensor.
    """
    if isinstance(given, Mapping):
        return [CallInputs(kwargs=dict(given))]
    if isinstance(given, (tuple, list)):
        return [CallInputs(tuple(given))]
    if isinstance(given, torch.Tensor):
        return [CallInputs((given,))]
    if given is not None:
        raise ExampleInputsError(
            f"example_inputs is a {type(given).__name__}; give a dict of keyword arguments, a tuple, or one tensor"
        )
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        return []
    inputs = dict(dummy)
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or "attention_mask" not in inspect.signature(model.forward).parameters:
        return [CallInputs(kwargs=inputs)]
    # With a mask the model builds its real masks instead of taking the is_causal short cut.
    short = CallInputs(kwargs={**inputs, "attention_mask": torch.ones_like(ids)})
    if set(inputs) != {"input_ids"}:
        return [short]
    window = _widest_window(getattr(model, "config", None))
    length = next((length for length in _DUMMY_LENGTHS if length > window), _DUMMY_LENGTHS[-1])
    long_ids = ids[:, :1].expand(-1, length).contiguous()
    return [CallInputs(kwargs={"input_ids": long_ids, "attention_mask": torch.ones_like(long_ids)}), short]


def _widest_window(config: Any) -> int:
    """The largest number under a name of a window in a config and the configs inside it; 0 if there is none."""
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    widest = 0
    for name, value in fields.items():
        if any(word in str(name) for word in ("window", "chunk", "local")):
            numbers = value if isinstance(value, (list, tuple)) else [value]
            widest = max([widest, *(number for number in numbers if isinstance(number, int))])
        elif isinstance(value, Mapping) or hasattr(value, "to_dict"):
            widest = max(widest, _widest_window(value))
    return widest
