"""Find a model's attention sites without running it: a fake copy goes through Dynamo, and only the report comes back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from msa_compile._compat import BackendCompilerFailed, FakeCopyMode, FakeTensorMode, ShapeEnv, compile_isolated
from msa_compile.config import MSAConfig
from msa_compile.errors import CaptureError, MSAError
from msa_compile.passes.pipeline import run_passes
from msa_compile.records import GraphRecord
from msa_compile.runtime import door_of, mark_dynamic

log = logging.getLogger(__name__)


def discover(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: MSAConfig, windows: dict[str, int]
) -> list[GraphRecord]:
    """What detection finds when ``model(*args, **kwargs)`` is captured, one record a graph.

    Neither the model nor the arguments are touched: both are copied onto fake tensors, which have shapes but no data, so
    a call costs no memory and no arithmetic, and a cache in the arguments stays as it was.

    Raises:
        CaptureError: If the model cannot be copied or captured on fake tensors.
    """
    records: list[GraphRecord] = []

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        records.append(run_passes(gm, config, windows, rewrite=False).record)
        return gm.forward  # type: ignore[no-any-return]

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    try:
        with FakeCopyMode(fake_mode):
            fake_model, fake_args, fake_kwargs = copy.deepcopy((model, tuple(args), dict(kwargs)))
        mark_dynamic((fake_args, fake_kwargs))
        with fake_mode, torch.random.fork_rng(devices=[]):
            compile_isolated(_call_dense, record)(fake_model, *fake_args, **fake_kwargs)
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, MSAError):
            raise failure.inner_exception from failure
        raise CaptureError(f"the model could not be captured: {failure}") from failure
    except MSAError:
        raise
    except TypeError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model could not be captured on fake tensors: {type(error).__name__}: {error}"
        ) from error
    return records


def _call_dense(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    door = door_of(module)
    forward = module.forward if door is None else door.dense_forward
    return forward(*args, **kwargs)
