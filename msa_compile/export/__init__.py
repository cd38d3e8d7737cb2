"""Artifacts of a sparsified model: ONNX and AOTInductor, with the same passes as at run time."""
