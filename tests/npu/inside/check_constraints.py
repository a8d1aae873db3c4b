"""What a real NPU refuses or gets wrong is refused: each planted violation, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.npu.inside.paged import PagedCall


def test_the_call_that_the_violations_change_is_accepted() -> None:
    PagedCall([3, 1], [140, 9]).run()
    _scatter()


def _table(call: PagedCall) -> Tensor:
    return call.block_table.npu()


ATTENTION: dict[str, tuple[Any, str]] = {
    "float32": (lambda c: {"query": c.query.float().npu()}, "float16 or bfloat16"),
    "two dtypes": (lambda c: {"query": c.query.half().npu()}, "one dtype"),
    "int64 block table": (lambda c: {"block_table": _table(c).long()}, "block_table is int32"),
    "strided block table": (
        lambda c: {"block_table": _table(c).repeat(1, 2)[:, ::2]},
        "block_table is contiguous",
    ),
    "short block table": (
        lambda c: {"block_table": _table(c)[:, :1].contiguous()},
        "block_table covers",
    ),
    "strided query": (
        lambda c: {"query": c.query.npu().repeat(1, 1, 2)[..., ::2]},
        "query is contiguous",
    ),
    "strided cache": (
        lambda c: {"key": c.key.flatten(2).npu().repeat(1, 1, 2)[..., ::2]},
        "contiguous",
    ),
    "lengths not cumulative": (
        lambda c: {"actual_seq_lengths": [3, 1]},
        "cumulative and ends at T",
    ),
    "falling lengths": (lambda c: {"actual_seq_lengths": [5, 4]}, "cumulative"),
    "one length missing": (lambda c: {"actual_seq_lengths_kv": [140]}, "same sequences"),
    "no lengths": (
        lambda c: {"actual_seq_lengths_kv": None},
        "actual_seq_lengths_kv must be passed",
    ),
    "no mask": (lambda c: {"atten_mask": None}, "2048 x 2048"),
    "small mask": (
        lambda c: {"atten_mask": c.arguments()["atten_mask"][:512, :512].contiguous()},
        "2048 x 2048",
    ),
    "float mask": (
        lambda c: {"atten_mask": c.arguments()["atten_mask"].half()},
        "bool, int8 or uint8",
    ),
    "mask with mode 0": (lambda c: {"sparse_mode": 0}, "sparse_mode 0 takes no atten_mask in TND"),
    "mode 2": (lambda c: {"sparse_mode": 2}, "sparse_mode 2"),
    "wrong block size": (lambda c: {"block_size": 64}, "multiple of 128"),
    "other block size": (
        lambda c: {"block_size": 256},
        r"\[blocks, block_size, num_key_value_heads",
    ),
    "heads": (lambda c: {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    "layout": (lambda c: {"input_layout": "TDN"}, "layout"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_refuses(name: str) -> None:
    change, constraint = ATTENTION[name]
    call = PagedCall([3, 1], [140, 9])
    call.changes = change(call)
    with pytest.raises(RuntimeError, match=constraint):
        call.run()


def test_attention_refuses_small_blocks_for_a_chunk() -> None:
    PagedCall([1, 1], [140, 9], block_size=16).run()
    with pytest.raises(RuntimeError, match="multiple of 128"):
        PagedCall([3, 1], [140, 9], block_size=16).run()


def test_attention_refuses_other_head_dims_in_tnd() -> None:
    with pytest.raises(RuntimeError, match="128 or 192"):
        PagedCall([1, 1], [140, 9], head_dim=64).run()


def test_attention_refuses_many_queries_without_a_mask() -> None:
    changes = {"sparse_mode": 0, "atten_mask": None}
    PagedCall([16], [140], changes=changes).run()
    with pytest.raises(RuntimeError, match="at most 16 queries"):
        PagedCall([17], [140], changes=changes).run()


def _own_mask(call: PagedCall, **changes: Any) -> dict[str, Any]:
    """One query a sequence and a mask of its own, over all places of the block table."""
    num_places = call.block_table.shape[1] * call.block_size
    shape = (len(call.seq_lens), 1, 1, num_places)
    mask = torch.zeros(shape, dtype=torch.bool, device="npu")
    query = call.query.flatten(1)[:, None].npu()
    own = {"query": query, "input_layout": "BSH", "sparse_mode": 0, "atten_mask": mask}
    return own | {"actual_seq_lengths": None} | changes


OWN_MASK: dict[str, tuple[Any, str]] = {
    "too narrow": (lambda m: m[..., :-1].contiguous(), "at least block_table"),
    "of another batch": (lambda m: m[:1].contiguous(), r"\[batch, keys\] or \[batch, 1, 1, keys\]"),
    "of three dimensions": (lambda m: m[:, 0], r"\[batch, keys\]"),
    "of floats": (lambda m: m.half(), "bool, int8 or uint8"),
    "strided": (lambda m: m.repeat(1, 1, 1, 2)[..., ::2], "atten_mask is contiguous"),
}


def test_attention_takes_a_mask_of_its_own_for_one_query() -> None:
    call = PagedCall([1, 1], [140, 9])
    call.changes = _own_mask(call)
    call.run()
    call.changes |= {"atten_mask": call.changes["atten_mask"][:, 0, 0]}
    call.run()


@pytest.mark.parametrize("name", OWN_MASK)
def test_attention_refuses_a_mask(name: str) -> None:
    change, constraint = OWN_MASK[name]
    call = PagedCall([1, 1], [140, 9])
    call.changes = _own_mask(call)
    call.changes |= {"atten_mask": change(call.changes["atten_mask"])}
    with pytest.raises(RuntimeError, match=constraint):
        call.run()


def test_attention_refuses_a_mask_of_its_own_for_several_queries() -> None:
    call = PagedCall([2, 2], [140, 9])
    query = call.query.view(2, 2, -1).npu()
    call.changes = _own_mask(call, query=query)
    with pytest.raises(RuntimeError, match="several queries"):
        call.run()


def _scatter(**changes: Any) -> None:
    cache = torch.zeros(3, 128, 2, 128, dtype=torch.bfloat16, device="npu")
    new = torch.ones(4, 2, 128, dtype=torch.bfloat16, device="npu")
    slots = torch.arange(4, dtype=torch.int32, device="npu")
    arguments = {
        "key": new,
        "value": new,
        "key_cache": cache,
        "value_cache": cache.clone(),
        "slot_mapping": slots,
        "cache_mode": "Norm",
    }
    torch_npu.npu_scatter_pa_kv_cache(**(arguments | changes))


def _ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device="npu")


SCATTER: dict[str, tuple[Any, str]] = {
    "NZ cache": (lambda: {"cache_mode": "PA_NZ"}, "cache_mode='Norm'"),
    "strided key": (lambda: {"key": _ones(4, 2, 256)[..., ::2]}, "key and value are contiguous"),
    "strided cache": (
        lambda: {"key_cache": _ones(3, 128, 2, 256)[..., ::2]},
        "caches? .*contiguous|contiguous",
    ),
    "dtype": (lambda: {"key": _ones(4, 2, 128, dtype=torch.float16)}, "one dtype"),
    "heads": (lambda: {"key": _ones(4, 1, 128), "value": _ones(4, 1, 128)}, "heads and head_size"),
    "slots dtype": (lambda: {"slot_mapping": _ones(4, dtype=torch.float32)}, "int32 or int64"),
    "slot count": (
        lambda: {"slot_mapping": _ones(3, dtype=torch.int32)},
        "one slot for each token",
    ),
}


@pytest.mark.parametrize("name", SCATTER)
def test_scatter_refuses(name: str) -> None:
    change, constraint = SCATTER[name]
    with pytest.raises(RuntimeError, match=constraint):
        _scatter(**change())


def test_norms_refuse_another_width() -> None:
    with pytest.raises(RuntimeError, match="last dimensions"):
        torch_npu.npu_rms_norm(_ones(4, 64), _ones(32))
    with pytest.raises(RuntimeError, match="gamma has the dtype"):
        torch_npu.npu_add_rms_norm(_ones(4, 64), _ones(4, 64), _ones(64, dtype=torch.float32))


def test_swiglu_refuses_a_strided_input() -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        torch_npu.npu_swiglu(_ones(4, 64)[:, ::2])


def test_rotary_refuses_other_tables() -> None:
    x, table = _ones(4, 1, 2, 64), _ones(4, 1, 1, 64)
    with pytest.raises(RuntimeError, match="as wide as x"):
        torch_npu.npu_rotary_mul(x, table[..., :32].contiguous(), table[..., :32].contiguous())
    with pytest.raises(RuntimeError, match="as many dimensions"):
        torch_npu.npu_rotary_mul(x, table[0], table[0])
    with pytest.raises(RuntimeError, match="rotary_mode"):
        torch_npu.npu_rotary_mul(x, table, table, rotary_mode="interleaved")


def test_top_k_top_p_refuses_other_dtypes() -> None:
    logits = _ones(2, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="k is int32"):
        torch_npu.npu_top_k_top_p(logits, None, _ones(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="dtype of logits"):
        torch_npu.npu_top_k_top_p(logits, _ones(2), None)
