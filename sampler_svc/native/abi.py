"""The structures of sampling.h, field for field; that file documents them."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p


class Choice(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("temperatures", c_void_p),
        ("min_p", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("uniforms", c_void_p),
        ("token_ids", c_void_p),
        ("num_rows", c_int64),
        ("stride", c_int64),
        ("vocab_size", c_int64),
    ]


class Logprobs(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("rows", c_void_p),
        ("token_ids", c_void_p),
        ("logprobs", c_void_p),
        ("ranks", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("num_tokens", c_int64),
        ("num_top", c_int64),
        ("stride", c_int64),
        ("vocab_size", c_int64),
    ]


STRUCTURES = (Choice, Logprobs)
