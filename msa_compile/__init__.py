"""MiniMax Sparse Attention for any PyTorch model: detected in the captured graph, rewritten, compiled."""

# `msa_compile.calibrate`, `.evaluate` and `.export` are verbs; what they are made of is in the folders of that name.
from msa_compile.api import dense, explain, sparsify, unsparsify
from msa_compile.calibrate.result import CalibrationResult
from msa_compile.calibration import calibrate, index_loss
from msa_compile.config import MSAConfig
from msa_compile.evaluate.fitted import BudgetFit
from msa_compile.evaluate.result import Evaluation
from msa_compile.export.records import ExportResult
from msa_compile.files import export, load, save
from msa_compile.functional import attention
from msa_compile.quality import evaluate, fit_budget
from msa_compile.records import Reason, Site
from msa_compile.report import Report

__version__ = "0.1.0"

__all__ = [
    "BudgetFit",
    "CalibrationResult",
    "Evaluation",
    "ExportResult",
    "MSAConfig",
    "Reason",
    "Report",
    "Site",
    "attention",
    "calibrate",
    "dense",
    "evaluate",
    "explain",
    "export",
    "fit_budget",
    "index_loss",
    "load",
    "save",
    "sparsify",
    "unsparsify",
]
