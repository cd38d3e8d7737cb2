"""Architectures of different forms, as the census checks them all (`make census`, `benchmarks/results/census.md`)."""

import logging

import pytest
import torch

from benchmarks.census.check import check_architecture

pytest.importorskip("transformers")

# Sparse sites, and reasons of the others.
EXPECTED = {
    "bart": (2, {}),
    "codegen": (2, {}),
    "cohere2": (1, {"sliding_window": 1}),
    "dbrx": (2, {}),
    "deepseek_v3": (0, {"latent_attention": 2}),
    "diffllama": (0, {"head_layout": 4}),
    "falcon": (2, {}),
    "gemma3n_text": (1, {"sliding_window": 1}),
    "glm4": (2, {}),
    "granite": (2, {}),
    "hunyuan_v1_dense": (2, {}),
    "gpt_bigcode": (2, {}),
    "gpt_neox": (2, {}),
    "gptj": (2, {}),
    "jamba": (1, {}),
    "llama4": (2, {}),
    "minimax_m3_vl_text": (2, {}),
    "mpt": (0, {"attention_bias": 2}),
    "olmo2": (2, {}),
    "persimmon": (2, {}),
    "qwen3_next": (1, {}),
    "stablelm": (2, {}),
    "zamba2": (1, {}),
}


@pytest.fixture(autouse=True)
def _one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # refusals and compilers are what is expected here
    torch._dynamo.reset()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


# With loops over tokens or experts, or many kinds of layers: up to minutes to capture.
LONG = ("dbrx", "gemma3n_text", "jamba", "qwen3_next", "zamba2")
# In forms that another architecture shows too.
ALIKE = ("gptj", "granite", "hunyuan_v1_dense", "olmo2", "persimmon", "stablelm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG + ALIKE else name for name in EXPECTED]
)
def test_an_architecture_is_found_and_right(name):
    row = check_architecture(name)
    assert row.right, row
    assert (row.sparse, row.dense) == EXPECTED[name]
