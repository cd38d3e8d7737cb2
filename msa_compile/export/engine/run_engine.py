"""Run an engine with TensorRT's own runtime, on tensors of torch. Not yet run: no TensorRT was at hand."""

from __future__ import annotations

import torch
from torch import Tensor


class Engine:
    """An engine on the current GPU, called with its inputs in order.

    An engine with plugins in Python needs `register_plugins` before; one without needs TensorRT alone.

    Args:
        plan: The bytes of the file.
    """

    def __init__(self, plan: bytes) -> None:
        import tensorrt as trt

        self._dtypes = {
            trt.float32: torch.float32,
            trt.float16: torch.float16,
            trt.bfloat16: torch.bfloat16,
            trt.int32: torch.int32,
            trt.int64: torch.int64,
            trt.bool: torch.bool,
        }
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        assert self._engine is not None, "TensorRT reads the engine; what it logged above says why not"
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(at) for at in range(self._engine.num_io_tensors)]
        self.inputs, self.outputs = (
            [name for name in names if self._engine.get_tensor_mode(name) == mode]
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Outputs in order, new tensors."""
        held = [
            tensor.to("cuda", self._dtypes[self._engine.get_tensor_dtype(name)]).contiguous()
            for name, tensor in zip(self.inputs, tensors, strict=True)
        ]
        for name, tensor in zip(self.inputs, held, strict=True):
            is_taken = self._context.set_input_shape(name, tuple(tensor.shape))
            assert is_taken, f"{name} of shape {list(tensor.shape)} lies in the profile of the engine"
            self._context.set_tensor_address(name, tensor.data_ptr())
        made = []
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            made.append(torch.empty(shape, dtype=self._dtypes[self._engine.get_tensor_dtype(name)], device="cuda"))
            self._context.set_tensor_address(name, made[-1].data_ptr())
        stream = torch.cuda.current_stream()
        assert self._context.execute_async_v3(stream.cuda_stream), "TensorRT enqueues the engine"
        stream.synchronize()
        return made
