"""One class per mistake, so that a caller can catch exactly the one that is theirs to handle.

The raiser writes the message: it names what was found, and what to do about it. A model that is merely not rewritten is
no error but a refusal with a reason, shown by `msa_compile.explain`.
"""


class MSAError(Exception):
    """Base of every error that `msa_compile` raises on purpose."""


class ConfigError(MSAError, ValueError):
    """Raised when a field of `MSAConfig` has a value outside its legal range."""


class UnknownOptionError(MSAError, ValueError):
    """Raised when `torch.compile(..., backend="msa", options=...)` is given an option that does not exist."""


class KernelArgumentError(MSAError, ValueError):
    """Raised when an op of `msa_compile.kernels` is called with shapes, dtypes or values that it does not accept."""


class KernelBuildError(MSAError, RuntimeError):
    """Raised when a CPU kernel could not be compiled; where none can be, the reference runs, and a warning says so."""


class ExampleInputsError(MSAError, TypeError):
    """Raised when `example_inputs` is not something that the model's `forward` can be called with."""


class NotAModuleError(MSAError, TypeError):
    """Raised when `sparsify` is given something that is no `torch.nn.Module`."""


class CompiledModelError(MSAError, TypeError):
    """Raised when `sparsify` is given the result of `torch.compile`; sparsify the original module first."""


class DataParallelError(MSAError, RuntimeError):
    """Raised when a sparsified model runs as a replica of `torch.nn.DataParallel`, which copies modules by hand."""


class NothingToSparsifyError(MSAError, ValueError):
    """Raised when no attention site of the model can be made sparse; the refusals, if any, are in the message."""


class SiteRefusedError(MSAError, ValueError):
    """Raised under `strict=True` when at least one attention site was found but stays dense."""


class AlreadySparseError(MSAError, ValueError):
    """Raised when `sparsify` is given a model that is sparse already; call `unsparsify` first."""


class NotSparseError(MSAError, ValueError):
    """Raised when a verb that needs a sparsified model, such as `unsparsify` or `dense`, is given another one."""


class CaptureError(MSAError, RuntimeError):
    """Raised when the model could not be captured as a graph, so that its attention was never seen."""


class GraphError(MSAError, RuntimeError):
    """Raised when a graph breaks an invariant that the passes keep: a bug of `msa_compile`, not of the model."""


class ExportNotSparseError(MSAError, RuntimeError):
    """Raised when an exported program would hold dense attention where the model in memory is sparse."""


class AdapterError(MSAError, ValueError):
    """Raised when saved index branches cannot be written or read, or do not belong to the model they are put into."""


class UnknownModelError(MSAError, ValueError):
    """Raised when `msa_compile.bench` is given a model that is no built-in shape, no path and not on the hub."""


class BenchArgumentError(MSAError, ValueError):
    """Raised when `msa_compile.bench` is given lengths, layers or a device that it cannot measure."""


class EvaluateArgumentError(MSAError, ValueError):
    """Raised when `evaluate` or `fit_budget` is given a number or a name outside its legal range."""


class BatchError(MSAError, TypeError):
    """Raised when a batch is nothing that the model can be called with, or does not say which tokens it holds."""


class EmptyDataError(MSAError, ValueError):
    """Raised when there is no batch, or no token in the batches that counts."""


class NoLogitsError(MSAError, ValueError):
    """Raised when a model returns no logits, or logits that are not those of every token."""


class NonFiniteError(MSAError, ArithmeticError):
    """Raised when a model's logits hold NaN or infinities, so that no number made of them means anything."""


class BudgetNotMetError(MSAError, ValueError):
    """Raised when no budget that `fit_budget` tried keeps the bar, so that every layer would have to stay dense."""


class MissingPackageError(MSAError, ImportError):
    """Raised when an optional package is needed for what was asked, and is not installed."""


class ExportFormatError(MSAError, ValueError):
    """Raised when the format of an export is not known, or cannot hold the cache that is asked for."""


class ExportCacheError(MSAError, ValueError):
    """Raised when a model cannot be exported with the cache that is asked for."""


class ExportIndexerError(MSAError, ValueError):
    """Raised when a site would select by something else in an artifact than in the model, or cannot be written."""


class ExportMemoryError(MSAError, ValueError):
    """Raised when an artifact would not fit the longest call of its profile."""


class ExportConverterError(MSAError, RuntimeError):
    """Raised when an operation of a model cannot go into a TensorRT engine."""


class ExportMismatchError(MSAError, RuntimeError):
    """Raised when an artifact computes something else than the model; nothing is written then."""


class ExportWriteError(MSAError, OSError):
    """Raised when an artifact cannot be written; no part of it is left."""


class CalibrateArgumentError(MSAError, ValueError):
    """Raised when `calibrate` is given a number, a name or data outside the legal range."""


class NothingToCalibrateError(MSAError, ValueError):
    """Raised when no site of a model can have an index branch to train; the reasons are in the message."""


class NoIndexLossError(MSAError, RuntimeError):
    """Raised when `index_loss` is asked for and the last call of the model left none to train with."""


class CheckpointError(MSAError, ValueError):
    """Raised when the checkpoint of a calibration cannot be read, or belongs to another run."""
