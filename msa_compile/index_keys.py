"""Index keys beside a model's own key cache: handed into a compiled graph, and taken out of it again.

A graph that uses index branches has an input more for each key cache that was handed in, and an output more for each
that is new. Index keys are remembered for the very tensor object that the model caches, with a stamp: the version of
that tensor when our call was over, and the weights that made the keys. Where the stamp does not hold, the tensor was
written by somebody else or the indexer changed: all its slots are then marked as not written, with NaN, and selection
is by ``"keys"`` wherever a query sees one (``msa::select_blocks_if_fresh``).

What is made in inference mode has no version. A key cache that a graph made there leaves it as a tensor that has one,
over the same memory, so that writes are counted there too; a cache that somebody else made there never has index keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_compile._compat import WeakTensorKeyDictionary, is_traceable_wrapper_subclass
from msa_compile.kernels.select_blocks import nan_in


@dataclass(frozen=True)
class Version:
    """How often a tensor was written in place, and where it lies; its memory is held, so that nothing else lies there.

    torch does not count what is written through ``.data`` or a raw pointer.
    """

    writes: int
    address: int
    memory: torch.UntypedStorage = field(compare=False, repr=False)


# What two generations of an indexer's weights differ in: which tensors they are, and their versions.
Generation = tuple[tuple[int, Version], ...]


@dataclass(frozen=True)
class IndexBinding:
    """How the index keys of one site go into a graph and come out of it.

    Attributes:
        site: Name of the site.
        weights: Places of the indexer's weights among the graph's inputs.
        dtype: Of the index keys; uint8 are the bytes of e4m3 numbers.
        source: Place among the inputs of the key cache that is handed in, or ``None`` when the graph makes it.
        dims: For each dimension of the index keys the dimension of the cache that it equals, ``None`` for the one head.
        grows: Whether the graph returns longer index keys; otherwise it writes into those that it was given.
        outputs: Places among the graph's own outputs of the tensors that hold all keys afterwards.
    """

    site: str
    weights: tuple[int, ...]
    dtype: torch.dtype
    source: int | None
    dims: tuple[int | None, ...]
    grows: bool
    outputs: tuple[int, ...]

    @property
    def is_returned(self) -> bool:
        """Whether the graph has an output for the index keys."""
        return self.grows and bool(self.outputs)


@dataclass(frozen=True)
class _State:
    """Index keys of one site for one cached tensor."""

    keys: Tensor
    version: Version
    generation: Generation


class IndexKeys:
    """The index keys of one compiled model. They follow no copy of a cache, and no copy of the model."""

    def __init__(self) -> None:
        self._states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def bound(self, compiled: Callable[..., Any], bindings: Sequence[IndexBinding]) -> Callable[..., Any]:
        """``compiled`` as Dynamo calls it: without the additional inputs and outputs."""
        if not bindings:
            return compiled
        handed_in = [(binding, binding.source) for binding in bindings if binding.source is not None]
        returned = [binding for binding in bindings if binding.is_returned]

        def run(*args: Any) -> Any:
            given = [self._take(binding, args[place], args) for binding, place in handed_in]
            outputs = compiled(*args, *given)
            own = list(outputs[: len(outputs) - len(returned)])
            _count_writes(own, {place for binding in returned for place in binding.outputs}, args)
            for binding, keys in zip(returned, outputs[len(own) :], strict=True):
                for place in binding.outputs:
                    self._keep(binding, own[place], keys, args)
            for (binding, place), keys in zip(handed_in, given, strict=True):
                if not binding.grows:
                    self._keep(binding, args[place], keys, args)
            return own

        return run

    def _take(self, binding: IndexBinding, cache: Tensor, args: Sequence[Any]) -> Tensor:
        """The index keys of a cache that was handed in; NaN where there are none."""
        shape = [1 if dim is None else cache.shape[dim] for dim in binding.dims]
        state = self._states.get(cache, {}).get(binding.site)
        made_like = (torch.Size(shape), binding.dtype, cache.device)
        if state is not None and (state.keys.shape, state.keys.dtype, state.keys.device) == made_like:
            if state.version == _version(cache) and state.generation == _generation(binding, args):
                return state.keys
            # Written in place, so that a cache of fixed place has index keys of fixed place.
            if binding.grows:
                return torch.full_like(state.keys, nan_in(binding.dtype))
            return state.keys.detach().fill_(nan_in(binding.dtype))
        with torch.inference_mode(False):  # a cache may outlive the mode of one call
            return torch.full(shape, nan_in(binding.dtype), dtype=binding.dtype, device=cache.device)

    def _keep(self, binding: IndexBinding, cache: Tensor, keys: Tensor, args: Sequence[Any]) -> None:
        version, generation, keys = _version(cache), _generation(binding, args), _versioned(keys.detach().contiguous())
        if version is None or generation is None or keys.is_inference():
            self._states.pop(cache, None)
            return
        states = self._states.setdefault(cache, {})
        states[binding.site] = _State(keys, version, generation)


def _count_writes(outputs: list[Any], places: Collection[int], args: Sequence[Any]) -> None:
    """Put tensors that count writes where a graph returns key caches that it made in inference mode.

    Only where nothing else that goes in or out lies in the same memory: it could write there uncounted.
    """
    made = {id(outputs[place]): outputs[place] for place in places if outputs[place].is_inference()}
    if not made:
        return
    others = {id(entry): entry for entry in (*args, *outputs) if isinstance(entry, Tensor) and id(entry) not in made}
    holders = Counter(place for entry in (*made.values(), *others.values()) for place in _storages(entry))
    alone = {key: _versioned(cache) for key, cache in made.items() if all(holders[at] == 1 for at in _storages(cache))}
    outputs[:] = [alone.get(id(entry), entry) for entry in outputs]


def _storages(tensor: Tensor) -> list[int]:
    """Where the memory of a tensor begins, and that of all parts of a subclass."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return [place for part in parts for place in _storages(getattr(tensor, part))]
    return [tensor.untyped_storage().data_ptr()] if tensor.layout == torch.strided else []


def _versioned(tensor: Tensor) -> Tensor:
    """``tensor``, or where it counts no writes, one of the same memory that does."""
    if not tensor.is_inference() or is_traceable_wrapper_subclass(tensor):
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _version(tensor: Tensor) -> Version | None:
    """What changes when a tensor is written in place; ``None`` for one made in inference mode, which does not count."""
    if tensor.is_inference():
        return None
    return Version(tensor._version, tensor.data_ptr(), tensor.untyped_storage())


def _generation(binding: IndexBinding, args: Sequence[Any]) -> Generation | None:
    weights = [args[place] for place in binding.weights]
    versions = [_version(weight) for weight in weights]
    known = [version for version in versions if version is not None]
    if len(known) < len(versions):
        return None
    return tuple((id(weight), version) for weight, version in zip(weights, known, strict=True))
