"""Save the index branches of a model, and put saved ones into a model of the same shapes; the base is untouched.

A folder holds ``indexers.safetensors``, named as in ``state_dict``, and ``msa_config.json``, which says what they
belong to. Each file appears whole or not at all, the description last, with a digest of the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msa_compile.config import MSAConfig
from msa_compile.errors import AdapterError, ConfigError
from msa_compile.indexer import INDEXER, IndexBranch, insert_index_branch
from msa_compile.whole_files import write_whole

log = logging.getLogger(__name__)

SCHEMA = 1
WEIGHTS = "indexers.safetensors"
DESCRIPTION = "msa_config.json"


@dataclass(frozen=True)
class Adapter:
    """A folder of saved index branches, checked for itself.

    Attributes:
        config: What the model was sparsified with.
        base: Digest of the names and shapes of the base's parameters.
        sites: For each path of an owner, whether its branch was calibrated.
        weights: By full name, ``"layers.0.self_attn.indexer.q_proj.weight"``.
        calibrated: What the last calibration did, in a line; ``""`` where there was none.
        calibration: What it found and decided, by site, as plain values.
    """

    config: MSAConfig
    base: str
    sites: dict[str, bool]
    weights: dict[str, Tensor]
    calibrated: str = ""
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_adapter(
    model: nn.Module,
    config: MSAConfig,
    folder: str | Path,
    *,
    calibrated: str = "",
    calibration: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Save the index branches of ``model``; ``calibrated`` and ``calibration`` as in ``Adapter``.

    Raises:
        AdapterError: There is none, or safetensors is not installed.
    """
    branches = _branches(model)
    if not branches:
        raise AdapterError(
            "the model has no index branch to save: it selects by keys, which have no parameters, or by an indexer of "
            "its own, which is part of its base"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{_full_name(path, INDEXER)}.{name}": tensor.detach().cpu().contiguous()
        for path, branch in branches.items()
        for name, tensor in branch.state_dict().items()
    }
    weights = _safetensors().save(state)
    description = {
        "schema": SCHEMA,
        "config": asdict(config),
        "base": fingerprint(model),
        "sites": {path: branch.is_calibrated for path, branch in branches.items()},
        "weights": hashlib.sha256(weights).hexdigest(),
        "calibrated": calibrated,
        "calibration": dict(calibration or {}),
    }
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def read_adapter(folder: str | Path) -> Adapter:
    """What ``write_adapter`` saved.

    Raises:
        AdapterError: The folder is no adapter, is of an unknown schema, or is damaged.
    """
    folder = Path(folder)
    try:
        said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} holds no adapter of msa_compile: {error}") from error
    schema = said.get("schema") if isinstance(said, dict) else None
    if schema != SCHEMA:
        raise AdapterError(f"{folder} has schema {schema!r}; this version reads {SCHEMA}. Update msa_compile.")
    if hashlib.sha256(weights).hexdigest() != said.get("weights"):
        raise AdapterError(f"{folder / WEIGHTS} is not the file that {DESCRIPTION} describes; save the adapter again")
    try:
        config = MSAConfig.from_options(_with_tuples(said["config"]))
        found = {"calibrated": said.get("calibrated", ""), "calibration": said.get("calibration", {})}
        return Adapter(config, said["base"], said["sites"], _safetensors().load(weights), **found)
    except (KeyError, TypeError, ConfigError) as error:
        raise AdapterError(f"{folder / DESCRIPTION} is damaged: {error}") from error


def check_adapter(adapter: Adapter, model: nn.Module) -> None:
    """Check that an adapter belongs to ``model``.

    Raises:
        AdapterError: Some site is not in the model, or the base has other parameters.
    """
    paths = {path for path, _ in model.named_modules()}
    missing = [path for path in adapter.sites if path not in paths]
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(adapter.sites)} sites of the adapter are not in {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    if fingerprint(model) != adapter.base:
        raise AdapterError(
            f"the parameters of {type(model).__name__} have other names or shapes than those that the adapter was "
            "saved with; load it into the model that it was made for"
        )


def insert_adapter(adapter: Adapter, model: nn.Module, *, is_forced: bool) -> None:
    """Give ``model`` the branches of an adapter that belongs to it.

    Raises:
        AdapterError: A site has no room for its branch, or weights are missing or have other shapes; the sites before
            it have theirs then.
    """
    for path, is_calibrated in adapter.sites.items():
        prefix = f"{_full_name(path, INDEXER)}."
        state = {
            name.removeprefix(prefix): tensor for name, tensor in adapter.weights.items() if name.startswith(prefix)
        }
        owner = model.get_submodule(path)
        try:
            (rows, hidden_size), (head_dim, _) = state["q_proj.weight"].shape, state["k_proj.weight"].shape
            if not insert_index_branch(owner, hidden_size, rows // head_dim, head_dim, is_forced=is_forced):
                raise AdapterError(f"{path} has no room for an index branch: the name {INDEXER!r} is taken")
            branch = owner.get_submodule(INDEXER)
            assert isinstance(branch, IndexBranch), "one was inserted"
            branch.load_state_dict(state, strict=True)
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"the index branch of {path} does not fit: {error}") from error
        branch.is_calibrated = is_calibrated
        # What was judged is used or not as it was judged.
        branch.is_forced = is_forced and path not in adapter.calibration


def fingerprint(model: nn.Module) -> str:
    """Digest of the names and shapes of a model's parameters, index branches left out."""
    ours = {
        f"{_full_name(path, INDEXER)}.{name}"
        for path, branch in _branches(model).items()
        for name, _ in branch.named_parameters()
    }
    shapes = [[name, list(parameter.shape)] for name, parameter in model.named_parameters() if name not in ours]
    return hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()


def warn_of_left_out(model: nn.Module) -> None:
    """Warn where a model was loaded from a folder that holds index branches: who loaded it could not use them.

    transformers' ``save_pretrained`` writes them, as part of ``state_dict``, and its ``from_pretrained`` leaves them
    out, as unexpected keys.
    """
    said = getattr(model, "name_or_path", None)
    folder = Path(said) if isinstance(said, str) and said else None
    if folder is None or not folder.is_dir():
        return
    tail = f".{INDEXER}.k_norm.weight"
    own = set(model.state_dict())
    sites = [name.removesuffix(tail) for name in _names_in(folder) if name.endswith(tail) and name not in own]
    if sites:
        where = str(folder) if (folder / DESCRIPTION).exists() else "the folder that msa_compile.save wrote"
        log.warning(
            "%s holds the index branches of %d sites (%s, ...), and the model was loaded without them: it selects as "
            "if they had never been. msa_compile.load(model, %r) puts them back; where nothing was saved with "
            "msa_compile.save, save_pretrained inside `with msa_compile.dense(model):` leaves them out",
            folder,
            len(sites),
            sites[0],
            where,
        )


def _names_in(folder: Path) -> list[str]:
    """Names of the weights in the safetensors of a folder, read off their headers; none of what cannot be read."""
    names: list[str] = []
    for path in sorted(folder.glob("model*.safetensors")):
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            names += json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return names


def _branches(model: nn.Module) -> dict[str, IndexBranch]:
    """The index branches of a model, by the path of their owner."""
    found = {path: module._modules.get(INDEXER) for path, module in model.named_modules()}
    return {path: branch for path, branch in found.items() if isinstance(branch, IndexBranch)}


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _with_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where a config has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise AdapterError('adapters are kept in safetensors: pip install "msa_compile[hf]"') from error
    return safetensors.torch
