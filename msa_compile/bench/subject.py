"""The model to measure: of the hub, of a config, or a built-in shape; whole, or the first layers where it must be."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa_compile._compat import hub_config, hub_model
from msa_compile.bench.decoder import Decoder, Widths
from msa_compile.bench.memory import available_bytes
from msa_compile.errors import BenchArgumentError, UnknownModelError

# Sources: the models' published configurations. MiniMax-M3 routes a token to four experts of 3072 and a shared one.
SHAPES = {
    "qwen3-8b": Widths(4096, 12288, 36, 151936, 32, 8, 128, has_qk_norm=True),
    "llama-3.1-70b": Widths(8192, 28672, 80, 128256, 64, 8, 128, theta=5e5),
    "minimax-m3": Widths(6144, 5 * 3072, 60, 200064, 64, 4, 128, has_qk_norm=True),
    "tiny": Widths(64, 128, 2, 256, 4, 2, 16),
}
# Of a model that is cut to a few layers: its own would weigh as much as many layers.
CUT_VOCABULARY = 4096
MOST_CUT_LAYERS = 4
# What may be filled with weights; caches and activations need the rest.
_SHARE_FOR_WEIGHTS = 0.5


@dataclass(frozen=True)
class Subject:
    """A model and how to run it.

    Attributes:
        model: In evaluation mode, on its device.
        vocabulary: Of random prompts.
        layers, all_layers: Layers that are there, and that the whole model has.
        notes: What a reader of the numbers has to know.
        first: Arguments of a prefill, from its token ids ``[1, T]`` and how many tokens will come after them.
        after: Arguments of one step, from a token id ``[1, 1]`` and the arguments and the result of the call before.
        logits: Of the result of a call, the last token's.
    """

    model: nn.Module
    vocabulary: int
    layers: int
    all_layers: int
    notes: tuple[str, ...]
    first: Callable[[Tensor, int], dict[str, Any]]
    after: Callable[[Tensor, dict[str, Any], Any], dict[str, Any]]
    logits: Callable[[Any], Tensor]

    def twin(self) -> nn.Module:
        """A copy of the model that shares its weights."""
        shared = {id(tensor): tensor for tensor in itertools.chain(self.model.parameters(), self.model.buffers())}
        twin: nn.Module = copy.deepcopy(self.model, dict(shared))
        return twin


def build_subject(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Subject:
    """The model called ``name``.

    Args:
        name: A key of ``SHAPES``, a name on the hub, a folder, or a ``config.json``.
        layers: Layers to keep; default all, or as many of four as fit into memory.
        dtype: Of the weights.
        device: Where it runs.

    Raises:
        UnknownModelError: There is no such model.
        BenchArgumentError: More layers than the model has, or not even one fits.
    """
    if layers is not None and layers < 1:
        raise BenchArgumentError(f"layers is {layers}; legal are whole numbers from 1")
    if name.lower() in SHAPES:
        return _build_shape(name.lower(), layers, dtype, device)
    return _build_hub(name, layers, dtype, device)


def _build_shape(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Subject:
    whole = SHAPES[name]

    def made(widths: Widths) -> Decoder:
        with torch.device("meta"):
            return Decoder(widths).to(dtype).eval()

    def cut(count: int) -> Widths:
        return replace(whole, layers=count, vocabulary=min(whole.vocabulary, CUT_VOCABULARY))

    count = choose_layers(whole.layers, layers, lambda n: size_of(made(cut(n) if n < whole.layers else whole)), device)
    model = made(whole if count == whole.layers else cut(count)).to_empty(device=device)
    torch.manual_seed(0)
    model.fill_randomly()
    notes = ["random weights", *cut_note(count, whole.layers, model.embed.num_embeddings < whole.vocabulary)]
    if name == "minimax-m3":
        notes.append("one MLP as wide as the experts that a token uses stands for the mixture; every layer is sparse")
    return Subject(
        model=model,
        vocabulary=model.embed.num_embeddings,
        layers=count,
        all_layers=whole.layers,
        notes=tuple(notes),
        first=lambda ids, room: {"ids": ids, "cache": model.make_cache(ids.shape[1] + room), "start": 0},
        after=lambda token, given, result: {
            "ids": token,
            "cache": given["cache"],
            "start": given["start"] + given["ids"].shape[1],
        },
        logits=lambda result: result,
    )


def _build_hub(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Subject:
    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise UnknownModelError(f"{name!r} is no built-in shape ({', '.join(SHAPES)}), and there is no such file")
    try:
        config = hub_config(name)
        text = config.get_text_config()
        # Taken from a file of settings alone, or cut, a model has no weights of its own.
        has_weights = not path.is_file() and (not path.is_dir() or any(path.glob("*.safetensors")))
    except ImportError as error:
        raise UnknownModelError(
            f"{name!r} is no built-in shape ({', '.join(SHAPES)}); other models need transformers: "
            "pip install msa_compile[hf]"
        ) from error
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UnknownModelError(
            f"{name!r} is no built-in shape ({', '.join(SHAPES)}), and no model could be read there: {error}"
        ) from error
    whole = int(text.num_hidden_layers)
    vocabulary = int(text.vocab_size)

    def size(count: int) -> int:
        with torch.device("meta"):
            return size_of(hub_model(_cut_config(config, count, whole), dtype))

    count = choose_layers(whole, layers, size, device)
    is_whole = count == whole
    torch.manual_seed(0)
    weights = name if has_weights and is_whole else None
    model = hub_model(config if is_whole else _cut_config(config, count, whole), dtype, weights=weights).to(device)
    is_cut = not is_whole and vocabulary > CUT_VOCABULARY
    # Only the last token's logits count; a model that cannot be told so computes them all, dense and sparse.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    notes = ["its own weights" if weights else "random weights", *cut_note(count, whole, is_cut)]
    return Subject(
        model=model,
        vocabulary=CUT_VOCABULARY if is_cut else vocabulary,
        layers=count,
        all_layers=whole,
        notes=tuple(notes),
        first=lambda ids, room: {"input_ids": ids, "use_cache": True, **last},
        after=lambda token, given, result: {
            "input_ids": token,
            "past_key_values": result.past_key_values,
            "use_cache": True,
            **last,
        },
        logits=lambda result: result.logits[:, -1:],
    )


def _cut_config(config: Any, count: int, whole: int) -> Any:
    """The configuration of the first ``count`` layers."""
    if count == whole:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    if text.vocab_size > CUT_VOCABULARY:
        text.vocab_size = CUT_VOCABULARY
        text.pad_token_id = None
    return config


def choose_layers(whole: int, asked: int | None, size: Callable[[int], int], device: torch.device) -> int:
    """How many layers to build.

    Args:
        whole: Layers of the model.
        asked: What the user asks for.
        size: Bytes of the weights with so many layers.
        device: Whose memory counts.

    Raises:
        BenchArgumentError: More than there are, or too large for the memory.
    """
    if asked is not None and asked > whole:
        raise BenchArgumentError(f"{asked} layers are asked for, and the model has {whole}")
    room = available_bytes(device) * _SHARE_FOR_WEIGHTS
    for count in (whole, *range(min(whole - 1, MOST_CUT_LAYERS), 0, -1)) if asked is None else (asked,):
        if size(count) <= room:
            return count
    needed = size(asked or 1)
    raise BenchArgumentError(
        f"{asked or 1} layer(s) need {needed / 2**30:.1f} GiB of weights, and {room / 2**30:.1f} GiB may be used "
        f"on {device}; ask for fewer layers or a smaller dtype"
    )


def size_of(model: nn.Module) -> int:
    """Bytes of the weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cut_note(layers: int, whole: int, is_vocabulary_cut: bool) -> list[str]:
    """What to say of a model that is not whole."""
    if layers == whole:
        return []
    return ["layers at their real widths", *([f"vocabulary cut to {CUT_VOCABULARY}"] if is_vocabulary_cut else [])]
