"""Tests on the emulated NPU. What needs torch_npu loaded runs in child processes: see inside/."""
