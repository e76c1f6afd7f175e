"""Without a GPU, Triton kernels run under its interpreter, which must be chosen before triton is imported."""

import os

import torch

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with it, and read it once
else:
    os.environ["TRITON_INTERPRET"] = "1"
    collect_ignore = ["kernels/test_cuda.py", "training/test_cuda_training.py"]
