"""Index branches of a model, trained by the product's own `calibrate` and kept as an adapter."""

from __future__ import annotations

from pathlib import Path

import msa_compile
from benchmarks.quality.model import LanguageModel
from benchmarks.quality.setting import Setting
from benchmarks.quality.subjects import sparsify
from benchmarks.quality.tasks import calibration_batches
from examples.byte_model import Corpus
from msa_compile import MSAConfig

CALIBRATED_SHARE = 16  # the budget at which the gate looks; what is learned does not depend on it


def calibrate_once(model: LanguageModel, setting: Setting, corpus: Corpus, folder: Path, seed: int) -> Path:
    """The folder with the calibrated index branches of a dense model, which is dense again afterwards."""
    if not (folder / "msa_config.json").exists():
        batches = calibration_batches(corpus, setting.calibration_steps, setting.size.context, seed)
        topk = max(2, setting.topk(CALIBRATED_SHARE))
        sparsify(model, MSAConfig(block_size=setting.block_size, topk_blocks=topk, dense_below=0))
        try:
            checkpoint = folder.with_suffix(".checkpoint")
            result = msa_compile.calibrate(
                model,
                batches,
                steps=setting.calibration_steps,
                learning_rate=setting.calibration_rate,
                min_mass_ratio=0.0,
                min_found=0.0,
                checkpoint=checkpoint,
                seed=seed,
            )
            print(result)
            msa_compile.save(model, folder)
        finally:
            msa_compile.unsparsify(model)
    return folder
