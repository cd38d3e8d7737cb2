"""MiniMax Sparse Attention for any PyTorch model: detected in the captured graph, rewritten, compiled."""

# `msa_compile.evaluate` is this verb; what it is made of is in the folder of that name.
from msa_compile.api import dense, evaluate, explain, fit_budget, load, save, sparsify, unsparsify
from msa_compile.config import MSAConfig
from msa_compile.evaluate.fitted import BudgetFit
from msa_compile.evaluate.result import Evaluation
from msa_compile.functional import attention
from msa_compile.records import Reason, Site
from msa_compile.report import Report

__version__ = "0.1.0"

__all__ = [
    "BudgetFit",
    "Evaluation",
    "MSAConfig",
    "Reason",
    "Report",
    "Site",
    "attention",
    "dense",
    "evaluate",
    "explain",
    "fit_budget",
    "load",
    "save",
    "sparsify",
    "unsparsify",
]
