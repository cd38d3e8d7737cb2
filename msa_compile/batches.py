"""A batch as the user gives it: how to call the model with it, and which of its tokens count."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msa_compile.errors import BatchError, EmptyDataError, NoLogitsError

IGNORED = -100  # the label of a token that does not count, as everywhere in PyTorch


@dataclass(frozen=True)
class Batch:
    """One call of a model, and the predictions in it that count.

    Attributes:
        args, kwargs: The call, on the device of the model.
        name: Name of the argument that holds the token ids.
        named: Every argument by its name.
        ids: int64 `[B, T]`.
        real: bool `[B, T]`, False where a token is padding.
        position: int64 `[B, T]`, how many real tokens of its row, or document, stand before each token.
        target: int64 `[B, T]`, the token that comes next, `IGNORED` where that does not count.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    named: Mapping[str, Any]
    ids: Tensor
    real: Tensor
    position: Tensor
    target: Tensor

    @property
    def counted(self) -> int:
        """How many predictions count."""
        return int((self.target != IGNORED).sum())

    def with_ids(self, model: nn.Module, ids: Tensor) -> Batch:
        """A call like this one with other token ids `[B, T]`, none of them padding.

        Raises:
            BatchError: The model cannot be called with them alone.
        """
        if self.args:
            return read_batch(model, (ids,))
        call = {self.name: ids}
        if isinstance(self.named.get("attention_mask"), Tensor):
            call["attention_mask"] = torch.ones_like(ids)
        if isinstance(self.named.get("position_ids"), Tensor):
            call["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
        return read_batch(model, call)


def read_batch(model: nn.Module, given: Any) -> Batch:
    """Understand a batch.

    A dict is called as keyword arguments, a tuple or list as positional ones, a tensor as the only one; which tensor is
    what is told by the names of `forward`'s parameters: `input_ids` (or the first integer tensor `[B, T]`),
    `attention_mask` (`[B, T]`, 0 where padded), `labels` (the ids again, -100 where they do not count, as transformers
    has them) and `position_ids`, which start again at each packed document. `labels` of a dict are not handed on where
    the model does without, so that it does not compute a loss that nobody reads.

    Raises:
        BatchError: It is none of these, or its tensors contradict each other.
    """
    args, kwargs = _as_call(given)
    device = next((parameter.device for parameter in model.parameters()), None)
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    signature = inspect.signature(model.forward)
    labels_given = kwargs.get("labels")
    if "labels" not in signature.parameters or signature.parameters["labels"].default is not inspect.Parameter.empty:
        kwargs.pop("labels", None)
    if "use_cache" in signature.parameters and not args:
        kwargs.setdefault("use_cache", False)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        parts = ", ".join(given) if isinstance(given, Mapping) else f"{len(args)} parts"
        raise BatchError(
            f"{type(model).__name__}.forward cannot be called with a batch of {parts}: {error}. Its signature is "
            f"{signature}. A batch is a dict of keyword arguments, a tuple of positional ones, or one tensor."
        ) from error
    named = _named(bound)
    name, ids = _token_ids(named)
    real = _real_tokens(named.get("attention_mask"), ids, has_labels=labels_given is not None)
    position = _positions(named.get("position_ids"), real)
    labels = named.get("labels") if labels_given is None else labels_given
    target = _next(ids if labels is None else _same_shape("labels", labels, ids))
    follows = _next(position, last=0) > 0
    counts = real & _next(real, last=False) & follows
    return Batch(args, kwargs, name, named, ids, real, position, target.masked_fill(~counts, IGNORED))


def logits_of(output: Any, batch: Batch) -> Tensor:
    """The logits `[B, T, V]` of a call: the output itself, its `logits`, or the first such tensor of a tuple.

    Raises:
        NoLogitsError: There are none, or they are not those of every token.
    """
    found = output
    if not isinstance(output, Tensor):
        parts = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if parts is None and isinstance(output, (tuple, list)):
            parts = next((part for part in output if isinstance(part, Tensor) and part.dim() == 3), None)
        found = parts
    if not isinstance(found, Tensor):
        raise NoLogitsError(
            f"the model returned {type(output).__name__} without logits; it has to return them as a tensor [B, T, V], "
            "as the first such tensor of a tuple, or as `.logits`: call a language model, not its inner model"
        )
    want = tuple(batch.ids.shape)
    if found.dim() != 3 or tuple(found.shape[:2]) != want or not found.is_floating_point():
        raise NoLogitsError(
            f"the model returned logits of shape {tuple(found.shape)} and {found.dtype} for token ids {want}; needed "
            f"are floating point logits {(*want, 'V')}. A model that returns the last token's alone has an argument "
            "for all of them (targets, logits_to_keep): put it into the batch"
        )
    return found


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; each module has its own mode back afterwards."""
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def check_iterable(batches: Any) -> Iterable[Any]:
    """`batches` if it can be a series of batches.

    Raises:
        BatchError: If it is one batch, or nothing of the kind.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise BatchError(
            f"batches is a {type(batches).__name__}; give a list or another iterable of batches, [batch] for one"
        )
    return batches


def nothing_counts() -> NoReturn:
    """Refuse data without a single prediction that counts.

    Raises:
        EmptyDataError: Always.
    """
    raise EmptyDataError(
        "no token counts in any batch: there are none (a used-up generator gives none), or every label is -100 or "
        "padding, or rows have a single token; give batches [B, T] with T of 2 or more"
    )


def _as_call(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Tensor):
        return (given,), {}
    raise BatchError(
        f"a batch is a {type(given).__name__}; it has to be a dict of keyword arguments, a tuple of "
        "positional ones, or one tensor"
    )


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name; those of `*args` and `**kwargs` too."""
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}[{index}]": part for index, part in enumerate(value)})
        else:
            named[name] = value
    return named


def _token_ids(named: Mapping[str, Any]) -> tuple[str, Tensor]:
    candidates = ["input_ids", *named] if "input_ids" in named else list(named)
    for name in candidates:
        value = named[name]
        if isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            return name, value.long()
    found = ", ".join(
        f"{name}: {list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{name}: {type(value).__name__}"
        for name, value in named.items()
    )
    raise BatchError(f"no token ids in a batch of {{{found}}}; needed is an integer tensor [B, T], named input_ids")


def _real_tokens(mask: Any, ids: Tensor, *, has_labels: bool) -> Tensor:
    if not isinstance(mask, Tensor) or (mask.dim() != 2 and has_labels):
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise BatchError(
            f"attention_mask is {list(mask.shape)} for token ids {list(ids.shape)}; what is padding can be read from a "
            "mask [B, T] only: give one, or labels with -100 where a token does not count"
        )
    return mask != 0


def _positions(position_ids: Any, real: Tensor) -> Tensor:
    """Real tokens before each token; `position_ids` know where a packed document starts."""
    counted = (real.long().cumsum(1) - 1).clamp(min=0)
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != real.shape[1]:
        return counted
    return position_ids.long().expand_as(counted)


def _same_shape(name: str, value: Any, ids: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != ids.shape or value.is_floating_point():
        found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise BatchError(f"{name} is {found}; it has to be an integer tensor {list(ids.shape)}, the shape of the ids")
    return value.long()


def _next(values: Tensor, last: int | bool = IGNORED) -> Tensor:
    """`values [B, T]` of the next token; the last one has none."""
    return torch.cat([values[:, 1:], values.new_full((values.shape[0], min(1, values.shape[1])), last)], dim=1)
