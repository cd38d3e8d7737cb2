"""A transformers model as a function of its cache: keys and values of every layer go in and come out.

A layer of the cache is what transformers calls, not what it is: it hands the new keys and values to `update` and
attends to what that returns. `"explicit"` puts them behind the old ones; `"static"` writes them into a buffer of fixed
length, where each row of the batch has its own position.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from msa_compile import _compat
from msa_compile.errors import ExampleInputsError, ExportCacheError
from msa_compile.export.capture import Call
from msa_compile.export.records import Cache

# What a layer keeps, in order. An index branch keeps its keys beside them.
STATES = ("key", "value")
_KNOWN = {"input_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict"}


class GrowingLayer:
    """One layer of a cache that is longer after each call."""

    is_initialized, is_sliding, is_compileable = True, False, False

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.keys, self.values = key, value

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind the old ones."""
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        return self.keys, self.values

    def get_seq_length(self, *rest: Any) -> int:
        """How many keys there are."""
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first slot of the keys of the next call."""
        return self.keys.shape[2] + query_length, 0


class WrittenLayer(GrowingLayer):
    """One layer of a cache of fixed length, written where each row stands."""

    def __init__(self, position: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__(key, value)
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values."""
        self.keys = torch.ops.msa.write_cache(self.keys, key_states, self.position)
        self.values = torch.ops.msa.write_cache(self.values, value_states, self.position)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first slot of the keys of the next call."""
        return self.keys.shape[2], 0


class WithoutCache(nn.Module):
    """Logits of whole prompts, padded at either end or not at all."""

    def __init__(self, model: nn.Module, logits_to_keep: int | None) -> None:
        super().__init__()
        self.model = model
        self.options = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T or logits_to_keep, V]`` of tokens ``[B, T]``."""
        batch, length = input_ids.shape
        visible = None if attention_mask is None else attention_mask.to(torch.bool)
        places = torch.arange(length, device=input_ids.device).expand(batch, length)
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.ops.msa.causal_mask(input_ids, length, None, visible),
            position_ids=places if visible is None else _content_places(visible),
            use_cache=False,
            **self.options,
        )
        logits: Tensor = out.logits
        return logits


class WithExplicitCache(nn.Module):
    """The next logits and the longer cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, past: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, ...]:
        """Logits ``[B, 1, V]`` after tokens ``[B, T]``, and the state of each layer, one tensor after the other.

        Args:
            input_ids: New tokens.
            attention_mask: ``[B, P + T]``, 0 where a key is padding.
            past: Of each layer, its states ``[B, Hkv, P, D]``.
        """
        batch, length = input_ids.shape
        before = past[0][0].shape[2]
        layers = [GrowingLayer(*states) for states in past]
        visible = None if attention_mask is None else attention_mask.to(torch.bool)
        places = torch.arange(before, before + length, device=input_ids.device).expand(batch, length)
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.ops.msa.causal_mask(input_ids, before + length, None, visible),
            position_ids=places if visible is None else _content_places(visible)[:, -length:],
            past_key_values=_compat.cache_of(layers),
            use_cache=True,
            logits_to_keep=1,
        )
        return (out.logits, *(state for layer in layers for state in (layer.keys, layer.values)))


class WithStaticCache(nn.Module):
    """The next logits and the written buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position: Tensor, past: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Logits ``[B, 1, V]`` after tokens ``[B, T]``, and the buffers of each layer, one after the other.

        Args:
            input_ids: New tokens.
            position: ``[B]`` int64, how many tokens each row has already.
            past: Of each layer, its buffers ``[B, Hkv, L, D]``, zeros where nothing was written.
        """
        layers = [WrittenLayer(position, *states) for states in past]
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.ops.msa.causal_mask(input_ids, past[0][0].shape[2], position, None),
            position_ids=position[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device),
            past_key_values=_compat.cache_of(layers),
            use_cache=True,
            logits_to_keep=1,
        )
        return (out.logits, *(state for layer in layers for state in (layer.keys, layer.values)))


def _content_places(visible: Tensor) -> Tensor:
    """The number of each token of a row, padding not counted."""
    return (visible.to(torch.int64).cumsum(-1) - 1).clamp(min=0)


def is_generating(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is called with tokens as transformers' own decoders are, so that its cache can be given to it."""
    taken = inspect.signature(model.forward).parameters
    return (
        {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"} <= set(taken)
        and isinstance(kwargs.get("input_ids"), Tensor)
        and set(kwargs) <= _KNOWN
        and hasattr(model, "config")
    )


@dataclass(frozen=True)
class Lengths:
    """Open sizes of a call of a decoder."""

    batch: Any
    length: Any
    most: int

    @property
    def past(self) -> Any:
        """Tokens before the call."""
        return Dim("past", min=0, max=max(self.most - 1, 1))


def decoder_call(model: nn.Module, kwargs: Mapping[str, Any], cache: Cache, lengths: Lengths) -> Call:
    """The capture of a transformers decoder with a cache of one kind.

    Raises:
        ExampleInputsError: What the cache does not go with.
        ExportCacheError: The model has layers that keep something else.
    """
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ExampleInputsError("attention_mask of an export is a tensor [B, T], or left out where nothing is padded")
    # torch.export takes a size of 1 for a constant.
    repeats = [1 if size > 1 else 2 for size in ids.shape]
    ids, mask = ids.repeat(repeats), None if mask is None else mask.repeat(repeats)
    rows = {0: lengths.batch, 1: lengths.length}
    if cache == "none":
        given = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        return Call(
            WithoutCache(model, kwargs.get("logits_to_keep")),
            "model.",
            (),
            given,
            dict.fromkeys(given, rows),
            output_names=("logits",),
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ExportCacheError(f"{type(model).__name__}.forward has no logits_to_keep; export it with cache='none'")
    shapes = _state_shapes(model, ids)
    batch = ids.shape[0]
    before = lengths.most if cache == "static" else 5
    generator = torch.Generator().manual_seed(0)
    past = [
        [torch.randn(batch, *shape(before), generator=generator).to(ids.device, dtype) for shape, dtype in layer]
        for layer in shapes
    ]
    names = [f"past_key_values.{at}.{state}" for at in range(len(past)) for state in STATES]
    out = ("logits", *(f"present.{at}.{state}" for at in range(len(past)) for state in STATES))
    if cache == "static":
        if mask is not None and not bool(mask.all()):
            raise ExampleInputsError(
                "a static cache has a position for each row and no padding: leave attention_mask out, and feed rows of "
                "different lengths one by one, or use cache='explicit'"
            )
        position = torch.zeros(batch, dtype=torch.int64, device=ids.device) + max(lengths.most - ids.shape[1], 0) // 2
        states = [[{0: lengths.batch}] * len(STATES)] * len(past)
        module: nn.Module = WithStaticCache(model)
        shape = (rows, {0: lengths.batch}, states)
        return Call(module, "model.", (ids, position, past), {}, shape, ("input_ids", "position", *names), out)
    states = [[{0: lengths.batch, 2: lengths.past}] * len(STATES)] * len(past)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(batch, before)], dim=1)
    total = None if mask is None else {0: lengths.batch, 1: Dim("total", min=1, max=2 * lengths.most)}
    given_names = ("input_ids", *(("attention_mask",) if mask is not None else ()), *names)
    module = WithExplicitCache(model)
    return Call(module, "model.", (ids, mask, past), {}, (rows, total, states), given_names, out)


def _state_shapes(model: nn.Module, ids: Tensor) -> list[list[tuple[Any, torch.dtype]]]:
    """For each layer and state, its shape after the batch as a function of the length, and its dtype."""
    with torch.no_grad():
        cache = model(input_ids=ids[:1, :2], use_cache=True).past_key_values
    layers = getattr(cache, "layers", None)
    found = []
    for layer in layers or ():
        kept = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        states = [state for state in kept if isinstance(state, Tensor)]
        if getattr(layer, "is_sliding", False) or len(states) != len(STATES):
            raise ExportCacheError(
                f"{type(model).__name__} keeps a {type(layer).__name__} besides plain keys and values; an artifact "
                "holds these only. Export it with cache='none'."
            )
        found.append([(_shaped(state.shape[1], state.shape[3]), state.dtype) for state in states])
    if not found:
        raise ExportCacheError(f"{type(model).__name__} returns no cache of layers; export it with cache='none'")
    return found


def _shaped(heads: int, dim: int) -> Any:
    return lambda length: (heads, length, dim)
