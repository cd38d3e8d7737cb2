"""Nothing outside the model is written: configuration, random numbers, modes, loggers."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import msa_compile
from msa_compile.errors import MSAError
from runtime.tiny import CONFIG, llama, small, tokens


def state():
    return {
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "random": torch.get_rng_state().tolist(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_our_calls_leave_global_state_alone(inner):
    import torch._inductor.config

    model, ids = small(), tokens()
    model(ids)
    before = state()
    msa_compile.explain(model, ids)
    msa_compile.sparsify(model, CONFIG, inner=inner, example_inputs=(ids,))
    with torch.no_grad():
        model(ids)
    with msa_compile.dense(model):
        model(ids)
    str(msa_compile.explain(model))
    msa_compile.unsparsify(model)
    after = state()
    if inner == "inductor":
        # What Inductor itself puts into its own environment is not ours.
        before.pop("environment"), after.pop("environment")
    assert {name for name in before if before[name] != after[name]} == set()


def test_discovery_of_a_transformers_model_draws_no_random_numbers():
    model = llama()
    before = torch.get_rng_state()
    msa_compile.explain(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_discovery_failure_leaves_global_state_alone():
    model = small()
    model.layers[0].attn.forward = lambda x: x @ x
    before = state()
    with pytest.raises(MSAError):
        msa_compile.sparsify(model, CONFIG, example_inputs=(tokens(),))
    after = state()
    assert {name for name in before if before[name] != after[name]} == set()


def test_our_logger_is_left_to_the_application():
    code = "import logging, msa_compile; l = logging.getLogger('msa_compile'); print(l.handlers, l.level, l.propagate)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] 0 True"
    assert logging.getLogger("msa_compile.runtime").handlers == []
