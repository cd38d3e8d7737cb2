"""MiniMax Sparse Attention for any PyTorch model: detected in the captured graph, rewritten, compiled."""

from msa_compile.api import dense, explain, export, sparsify, unsparsify
from msa_compile.config import MSAConfig
from msa_compile.export.records import ExportResult
from msa_compile.functional import attention
from msa_compile.records import Reason, Site
from msa_compile.report import Report

__version__ = "0.1.0"

__all__ = [
    "ExportResult",
    "MSAConfig",
    "Reason",
    "Report",
    "Site",
    "attention",
    "dense",
    "explain",
    "export",
    "sparsify",
    "unsparsify",
]
