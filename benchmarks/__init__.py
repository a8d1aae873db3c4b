"""What measures; run as `python -m benchmarks.NAME`."""

from stages.torch_backends import hide_torch_npu

hide_torch_npu()
