"""What the user asks for: one frozen record, validated when it is made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NoReturn

from msa_compile.errors import ConfigError, UnknownOptionError

MAX_BLOCK_SIZE = 65536
INDEXERS = ("auto", "keys", "learned")
FALLBACKS = ("keys", "dense")
INDEX_SCORES = INDEX_CACHES = ("exact", "fp8")
# Blocks that are scored again for each that is chosen, where scores are fp8.
_CANDIDATES = 2


@dataclass(frozen=True)
class MSAConfig:
    """How sparse the attention shall be, and which attention sites are meant.

    Each query attends to the visible tokens of at most `topk_blocks` blocks of `block_size` keys. The query's own block
    and the blocks before it (`local_blocks`) and the first blocks of the row (`sink_blocks`) are always among them and
    use up slots; the indexer chooses the rest.

    >>> config = MSAConfig(block_size=64, topk_blocks=8, exclude="lm.layers.0.*")
    >>> config.resolved_dense_below()
    512
    >>> config.matches("lm.layers.0.self_attn"), config.matches("lm.layers.1.self_attn")
    (False, True)
    >>> MSAConfig(budgets={"lm.layers.0.*": 32}).for_site("lm.layers.0.self_attn").topk_blocks
    32

    Args:
        block_size: Keys in a block, 1 to 65536.
        topk_blocks: Blocks that one query of one key/value group attends to, at least 1; local and sink blocks count.
        local_blocks: Blocks that are always selected, counted back from the query's own; 1 to `topk_blocks`.
        sink_blocks: Blocks that are always selected, counted from the row's first; `local_blocks + sink_blocks` may not
            exceed `topk_blocks`.
        indexer: `"keys"` scores a block by the group's mean attention logit and has no parameters. `"learned"` gives
            each site the paper's Index Branch, `module.indexer`, and selects by it, trained or not, until
            :func:`msa_compile.calibrate` has judged it; a site for which a branch is not proved scores with `"keys"`.
            `"auto"` takes the best indexer that the site has, which is `"keys"` for a site without a calibrated one.
        include: Globs over module paths, such as `"model.layers.*.self_attn"`; one string is one glob. `*` also matches
            dots.
        exclude: Globs over module paths that stay dense; they win over `include`.
        dense_below: Calls with at most this many keys take the dense path; 0 never takes it. `"auto"` is what keeps
            sparse from being the slower one: a break-even that is measured once a machine and shape, for two or three
            seconds when the first graph is compiled, and kept on disk; `topk_blocks * block_size` at least.
        strict: Whether a site that is meant but has to stay dense is an error.
        budgets: `topk_blocks` of single sites, by glob over module paths; of several that match, the first counts. A
            dict becomes a tuple of pairs. :func:`msa_compile.fit_budget` finds them.
        fallback: What becomes of a site whose index branch :func:`msa_compile.calibrate` trained and found not good
            enough: `"keys"` selects by the keys, `"dense"` leaves the site dense.
        index_scores: `"exact"` scores blocks by index queries and keys as they are. `"fp8"` scores them by both rounded
            to e4m3, which is less work where matrix units are the limit, and the best `2 * topk_blocks` of a query
            again by both as they are; a block that e4m3 ranks lower than that is missed. For prompts: calls of at most
            16 queries score as `"exact"`. On a GPU it needs compute capability 8.9; a CPU computes the same, slower.
        index_cache: `"exact"` keeps the index keys of a learned indexer as they are, `"fp8"` as e4m3, a byte a number:
            half of what a decode step reads to select, at the price of keys of 3 bits. All calls select by the rounded
            keys, with a cache or without; training and its measures use them as they are.

    Raises:
        ConfigError: A field is outside its legal range.
    """

    block_size: int = 128
    topk_blocks: int = 16
    local_blocks: int = 1
    sink_blocks: int = 0
    indexer: Literal["auto", "keys", "learned"] = "auto"
    include: tuple[str, ...] | str = ("*",)
    exclude: tuple[str, ...] | str = ()
    dense_below: int | Literal["auto"] = "auto"
    strict: bool = False
    budgets: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    fallback: Literal["keys", "dense"] = "keys"
    index_scores: Literal["exact", "fp8"] = "exact"
    index_cache: Literal["exact", "fp8"] = "exact"

    def __post_init__(self) -> None:
        self._check_int("block_size", 1, MAX_BLOCK_SIZE)
        self._check_int("topk_blocks", 1, None)
        self._check_int("local_blocks", 1, self.topk_blocks, "topk_blocks")
        self._check_int("sink_blocks", 0, self.topk_blocks - self.local_blocks, "topk_blocks - local_blocks")
        indexer: object = self.indexer
        if not (isinstance(indexer, str) and indexer in INDEXERS):
            self._refuse("indexer", f"one of {_quoted(INDEXERS)}")
        fallback: object = self.fallback
        if not (isinstance(fallback, str) and fallback in FALLBACKS):
            self._refuse("fallback", f"one of {_quoted(FALLBACKS)}")
        index_scores: object = self.index_scores
        if not (isinstance(index_scores, str) and index_scores in INDEX_SCORES):
            self._refuse("index_scores", f"one of {_quoted(INDEX_SCORES)}")
        index_cache: object = self.index_cache
        if not (isinstance(index_cache, str) and index_cache in INDEX_CACHES):
            self._refuse("index_cache", f"one of {_quoted(INDEX_CACHES)}")
        # The record is frozen for its readers; globs are brought to one form before anybody reads them.
        object.__setattr__(self, "include", self._globs("include"))
        object.__setattr__(self, "exclude", self._globs("exclude"))
        if not self.include:
            self._refuse("include", "at least one glob over module paths; ('*',) means every module")
        if self.dense_below != "auto" and not (_is_int(self.dense_below) and self.dense_below >= 0):
            self._refuse("dense_below", "'auto' or an int of 0 or more")
        if not isinstance(self.strict, bool):
            self._refuse("strict", "True or False")
        object.__setattr__(self, "budgets", self.own_budgets)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, *, also: Iterable[str] = ()) -> MSAConfig:
        """Makes a config of the `options` that the user gave to `torch.compile(..., backend="msa")`.

        >>> MSAConfig.from_options({"block_size": 64}).block_size
        64

        Args:
            options: Field names of `MSAConfig` and their values; None is no options.
            also: Further legal names, which the caller reads itself; they are skipped here.

        Returns:
            The config, defaults where `options` says nothing.

        Raises:
            UnknownOptionError: A name is neither a field nor in `also`.
            ConfigError: A value is outside its field's legal range.
        """
        names = [field.name for field in fields(cls)]
        skipped = list(also)
        given = dict(options or {})
        unknown = [name for name in given if name not in names and name not in skipped]
        if unknown:
            legal = [*names, *skipped]
            raise UnknownOptionError(
                "; ".join(_unknown_option(name, legal) for name in unknown) + f". Legal options: {', '.join(legal)}"
            )
        return cls(**{name: value for name, value in given.items() if name in names})

    def matches(self, name: str) -> bool:
        """Whether the module path `name` is meant: some glob of `include` matches it, and none of `exclude`.

        The model itself has the path `""`, which `"*"` matches. Letters match in their own case.
        """
        return any(fnmatchcase(name, glob) for glob in self.include) and not any(
            fnmatchcase(name, glob) for glob in self.exclude
        )

    def for_site(self, name: str) -> MSAConfig:
        """The config of the site with the module path `name`: `topk_blocks` is its own, and `budgets` is empty."""
        own = (topk for glob, topk in self.own_budgets if fnmatchcase(name, glob))
        return replace(self, topk_blocks=next(own, self.topk_blocks), budgets=())

    @property
    def candidates(self) -> int:
        """Blocks of a query that are scored again, by `index_scores`; 0 where all are scored once."""
        return _CANDIDATES * self.topk_blocks if self.index_scores == "fp8" else 0

    def resolved_dense_below(self) -> int:
        """The number of keys up to which a call takes the dense path; the least that it can be for `"auto"`.

        That is `topk_blocks * block_size`: up to there every visible block is selected, so that dense attention is the
        same attention and cheaper. What is measured can only be more.
        """
        if isinstance(self.dense_below, int):
            return self.dense_below
        return self.topk_blocks * self.block_size

    def _check_int(self, field: str, low: int, high: int | None, bound: str = "") -> None:
        value = getattr(self, field)
        if not (_is_int(value) and value >= low and (high is None or value <= high)):
            named = f" ({bound})" if bound else ""
            span = f"of {low} or more" if high is None else f"from {low} to {high}{named}"
            self._refuse(field, f"an int {span}")

    def _globs(self, field: str) -> tuple[str, ...]:
        value = getattr(self, field)
        globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
        if globs is None or not all(isinstance(glob, str) for glob in globs):
            self._refuse(field, "a glob over module paths, or a tuple or list of globs")
        return globs

    @property
    def own_budgets(self) -> tuple[tuple[str, int], ...]:
        """`budgets` as pairs of a glob and a number of blocks."""
        given = self.budgets
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given
        if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            self._refuse("budgets", "a dict from globs over module paths to numbers of blocks")
        least = self.local_blocks + self.sink_blocks
        if not all(isinstance(glob, str) and _is_int(topk) and topk >= least for glob, topk in pairs):
            self._refuse("budgets", f"globs over module paths with ints from {least} (local_blocks + sink_blocks)")
        return pairs

    def _refuse(self, field: str, legal: str) -> NoReturn:
        raise ConfigError(f"MSAConfig.{field} is {getattr(self, field)!r}; it must be {legal}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _unknown_option(name: object, legal: list[str]) -> str:
    close = difflib.get_close_matches(str(name), legal, n=3)
    return f"unknown option {name!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
