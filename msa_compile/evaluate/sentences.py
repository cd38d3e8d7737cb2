"""The probes as English sentences, for who has a tokenizer."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from msa_compile.errors import EvaluateArgumentError

Encode = Callable[[str], Sequence[int]]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = 5  # digits


def encoder(tokenizer: Any) -> Encode:
    """`encode` of a tokenizer, without the special tokens that some put around a text.

    Raises:
        EvaluateArgumentError: It has none.
    """
    encode = getattr(tokenizer, "encode", None)
    # A string has an encode too.
    if not callable(encode) or isinstance(tokenizer, str):
        raise EvaluateArgumentError(
            f"tokenizer is a {type(tokenizer).__name__} without encode(text); give one that has it, or None for probes "
            "of token ids"
        )
    options = {"add_special_tokens": False} if "add_special_tokens" in inspect.signature(encode).parameters else {}

    def ids(text: str) -> Sequence[int]:
        encoded = encode(text, **options)
        found = list(getattr(encoded, "ids", encoded))
        if not all(isinstance(token, int) for token in found):
            raise EvaluateArgumentError(
                f"encode of the {type(tokenizer).__name__} gives no list of token ids but {encoded!r:.60}"
            )
        return found

    return ids


def spell(name: str, many: int, choose: torch.Generator) -> tuple[list[str], list[tuple[str, bool]]]:
    """What to hide, and the pieces at the end of the prompt, each with whether it has to be found.

    Args:
        name: Of the probe.
        many: Needles of the multi-key probe, variables of a chain.
        choose: What is hidden.
    """
    words = _words(many, choose)
    numbers = ["".join(map(str, torch.randint(10, (_NUMBER,), generator=choose).tolist())) for _ in words]
    if name == "variable-tracking":
        facts = [f" VAR {words[0]} = {numbers[0]}."]
        facts += [f" VAR {later} = {earlier}." for earlier, later in itertools.pairwise(words)]
        ending = []
        # The chain is followed aloud, hop by hop.
        for left, right in zip(words[::-1], [*words[-2::-1], numbers[0]], strict=True):
            ending += [(f" VAR {left} =", False), (f" {right}", True), (".", False)]
        return facts, ending[:-1]
    asked = int(torch.randint(many, (), generator=choose))
    kept = range(many) if name == "multi-key" else [asked]
    facts = [f" The number of {words[index]} is {numbers[index]}." for index in kept]
    return facts, [(f" The number of {words[asked]} is", False), (f" {numbers[asked]}", True)]


def _words(count: int, choose: torch.Generator) -> list[str]:
    """Names that differ."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(_LETTERS[index] for index in torch.randint(len(_LETTERS), (5,), generator=choose).tolist())
        if name not in names:
            names.append(name)
    return names
