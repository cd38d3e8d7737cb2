"""Decide which call of which module is captured, and which of its sizes are open."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from msa_compile.config import MSAConfig
from msa_compile.errors import ExampleInputsError, ExportCacheError
from msa_compile.export.caches import Lengths, decoder_call, is_generating
from msa_compile.export.capture import Call
from msa_compile.export.records import Cache
from msa_compile.records import Site

# Masks that the arguments of an exported attention can say.
_POSITIONAL = {"causal", "causal+padding"}
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Request:
    """What is to be exported; the last three are as the user gave them.

    Attributes:
        model: The model, dense.
        args, kwargs: One call of it.
        config: Of the sparsified model.
        windows: Sliding windows known of its sites.
        sites: Its attention, as it was found.
        dynamic_shapes, cache, max_length: As in `msa_compile.export`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    config: MSAConfig
    windows: Mapping[str, int]
    sites: tuple[Site, ...]
    dynamic_shapes: Any
    cache: Cache
    max_length: int | None

    @property
    def class_name(self) -> str:
        """Of the model."""
        return type(self.model).__name__


def plan_call(request: Request) -> Call:
    """The call to capture.

    A transformers decoder whose sites are all sparse and causal is captured with masks that are arguments; any other
    model as it is.

    Raises:
        ExportCacheError: The cache that is asked for does not go with the model.
        ExampleInputsError: The longest call is not known.
    """
    is_decoder = not request.args and is_generating(request.model, request.kwargs)
    is_causal = not request.windows and all(
        site.decision == "sparse" and site.mask in _POSITIONAL for site in request.sites
    )
    _check_cache(request, is_decoder=is_decoder, is_causal=is_causal)
    shapes = request.dynamic_shapes
    if is_decoder and is_causal and (shapes is None or set(shapes) <= {"input_ids", "attention_mask"}):
        given = dict((shapes or {}).get("input_ids") or {})
        most = _longest(request)
        lengths = Lengths(
            batch=given.get(0, Dim("batch", min=1, max=_LARGEST_BATCH)),
            length=given.get(1, Dim("length", min=1, max=most)),
            most=most,
        )
        return decoder_call(request.model, request.kwargs, request.cache, lengths)
    kwargs = dict(request.kwargs)
    if "use_cache" in inspect.signature(request.model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    if shapes is None:
        shapes = _open_sizes(request.model, request.args, kwargs, _longest(request))
    return Call(request.model, "", request.args, kwargs, shapes)


def _check_cache(request: Request, *, is_decoder: bool, is_causal: bool) -> None:
    if request.cache == "none":
        return
    if not is_decoder:
        raise ExportCacheError(
            f"cache={request.cache!r} is for a transformers decoder that is called with input_ids, and attention_mask "
            f"at most. {request.class_name} is exported with cache='none': let its forward take its cache as arguments "
            "and return it, and give them as example_inputs."
        )
    if not is_causal:
        raise ExportCacheError(
            f"{request.class_name} has layers that stay dense, or whose mask is more than causal (a sliding window, "
            "say), which a cache of plain keys and values does not carry. Export it with cache='none'."
        )


def _longest(request: Request) -> int:
    config = getattr(request.model, "config", None)
    most = request.max_length or getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 2:
        raise ExampleInputsError(
            "the longest call is not known: give max_length (2 or more), or dynamic_shapes with a range for each open "
            "size"
        )
    return most


def _open_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], most: int) -> Any:
    """Batch and length of the first input, open wherever an input has them."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = next((tensor for tensor in tensors if tensor.dim() >= 2), None)
    if first is None:
        raise ExampleInputsError("no input has a batch and a length; give dynamic_shapes")
    if 1 in first.shape[:2]:
        raise ExampleInputsError(
            f"the first input is {list(first.shape)}, and torch.export takes a size of 1 for a constant: give an "
            "example with two rows and two tokens at least, or dynamic_shapes that say what is open"
        )
    length, batch = Dim("length", min=1, max=most), Dim("batch", min=1, max=_LARGEST_BATCH)

    def dims(value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        # The last size of activations is their width.
        last = value.dim() - 1 if value.dim() > 2 and value.dtype.is_floating_point else value.dim()
        found: dict[int, Any] = {at: length for at in range(1, last) if value.shape[at] == first.shape[1]}
        return found | ({0: batch} if value.dim() > 1 and value.shape[0] == first.shape[0] else {})

    if not kwargs:
        return tuple(pytree.tree_map(dims, arg) for arg in args)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(dims, value) for name, value in bound.items()}
