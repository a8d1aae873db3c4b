"""The operators on NVIDIA GPUs: Triton kernels and cuBLAS.

Imported for `--device cuda` only: every module in here imports triton.
"""
