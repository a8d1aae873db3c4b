"""The structures of headrace.h, field for field; that file documents them."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p


class Linear(ctypes.Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("out_size", c_int64),
        ("in_size", c_int64),
        ("dtype", c_int64),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("order", c_void_p),
        ("group_size", c_int64),
    ]


class LayerCache(ctypes.Structure):
    _fields_ = [("key", c_void_p), ("value", c_void_p)]


class Cache(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(LayerCache)),
        ("num_blocks", c_int64),
        ("block_size", c_int64),
        ("dtype", c_int64),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logits_indices", c_void_p),
        ("logits", c_void_p),
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("num_logits", c_int64),
        ("table_stride", c_int64),
        ("chosen", c_void_p),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
    ]


class Rope(ctypes.Structure):
    _fields_ = [
        ("frequencies", c_void_p),
        ("half", c_int64),
        ("scale", c_float),
        ("padding", c_float),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("attention_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("behind_attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("behind_mlp_norm", c_void_p),
        ("attention", Attention),
        ("rope", c_int64),
    ]


class Decoder(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("ropes", ctypes.POINTER(Rope)),
        ("head", Linear),
        ("final_norm", c_void_p),
        ("embedding", c_void_p),
        ("embedding_dtype", c_int64),
        ("num_layers", c_int64),
        ("num_ropes", c_int64),
        ("hidden_size", c_int64),
        ("inner_size", c_int64),
        ("activation", c_int64),
        ("rms_norm_eps", c_float),
        ("embedding_scale", c_float),
        ("logits_soft_cap", c_float),
        ("padding", c_float),
        ("screen", c_void_p),
    ]


STRUCTURES = (Linear, LayerCache, Cache, Batch, Attention, Rope, Layer, Decoder)
