"""A stand-in for CANN, under which the real torch_npu runs without an NPU. See README.md."""
