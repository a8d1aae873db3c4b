"""npu_fused_infer_attention_score against plain attention, on random batches."""

from __future__ import annotations

import random

import pytest
import torch
import torch_npu

from tests.npu.inside.paged import PagedCall, causal_mask


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_chunks_and_decodes_in_one_call(seed: int, dtype: torch.dtype) -> None:
    chance = random.Random(seed)
    query_lens = [chance.choice([1, 1, 5, 40]) for _ in range(4)]
    seq_lens = [length + chance.randrange(300) for length in query_lens]
    kv_heads, group = chance.choice([(1, 4), (2, 2), (4, 1)])
    call = PagedCall(query_lens, seq_lens, kv_heads * group, kv_heads, dtype=dtype, seed=seed)
    _close(call.run(), call.expected()[0])


@pytest.mark.parametrize("block_size", [16, 128, 256])
def test_decode_alone(block_size: int) -> None:
    call = PagedCall([1, 1, 1], [7, 130, 300], block_size=block_size)
    _close(call.run(), call.expected()[0])
    call.changes = {"sparse_mode": 0, "atten_mask": None}
    _close(call.run(), call.expected()[0])


def test_a_cache_of_four_dimensions() -> None:
    call = PagedCall([3, 1], [140, 9])
    call.changes = {
        "key": call.key.transpose(1, 2).contiguous().npu(),
        "value": call.value.transpose(1, 2).contiguous().npu(),
    }
    _close(call.run(), call.expected()[0])


@pytest.mark.parametrize("window", [0, 3, 150])
def test_sliding_window(window: int) -> None:
    call = PagedCall([5, 1], [200, 90])
    call.changes = {"sparse_mode": 4, "pre_tokens": window, "next_tokens": 0}
    _close(call.run(), call.expected(window)[0])


def test_padding_rows_of_a_captured_batch() -> None:
    """A padding row has one query and no or one key, in the null block."""
    call = PagedCall([1, 1, 1], [9, 1, 1])
    call.block_table[1:] = 0
    _close(call.run(), call.expected()[0])
    call.changes = {"actual_seq_lengths_kv": [9, 0, 0]}
    assert call.run()[1:].cpu().eq(0).all()


def test_log_sums() -> None:
    call = PagedCall([5, 1], [200, 90])
    arguments = call.arguments() | {"softmax_lse_flag": True}
    out, lse = torch_npu.npu_fused_infer_attention_score(**arguments)
    expected, expected_lse = call.expected()
    _close(out, expected)
    assert lse.dtype == torch.float32
    _close(lse.squeeze(-1), expected_lse)


def test_without_a_block_table_both_lengths_are_cumulative() -> None:
    call = PagedCall([5, 9], [5, 9])
    contexts = [call.context(row) for row in range(2)]
    key, value = (torch.cat(parts).to(call.dtype).npu() for parts in zip(*contexts, strict=True))
    call.changes = {
        "key": key,
        "value": value,
        "block_table": None,
        "actual_seq_lengths_kv": [5, 14],
    }
    _close(call.run(), call.expected()[0])


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
@pytest.mark.parametrize("head_dim", [64, 16])
def test_batched_layouts_take_other_head_dims(layout: str, head_dim: int) -> None:
    call = PagedCall([1, 1], [200, 90], head_dim=head_dim)
    query = {
        "BSND": call.query[:, None],
        "BNSD": call.query[:, :, None],
        "BSH": call.query.flatten(1)[:, None],
    }[layout]
    call.changes = {"query": query.npu(), "input_layout": layout, "actual_seq_lengths": [1, 1]}
    _close(call.run().view_as(call.query), call.expected()[0])


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
def test_a_mask_of_its_own_hides_what_lies_behind_a_length(layout: str) -> None:
    """Lengths may then be bounds: the keys between are read, and weigh nothing."""
    call = PagedCall([1, 1, 1], [200, 90, 3])
    query = {
        "BSND": call.query[:, None],
        "BNSD": call.query[:, :, None],
        "BSH": call.query.flatten(1)[:, None],
    }[layout]
    places = torch.arange(call.block_table.shape[1] * call.block_size)
    hidden = places >= torch.tensor(call.seq_lens)[:, None]
    call.changes = {
        "query": query.npu(),
        "input_layout": layout,
        "sparse_mode": 0,
        "atten_mask": hidden[:, None, None].npu(),
        "actual_seq_lengths": None,
        "actual_seq_lengths_kv": [256, 120, 128],
    }
    _close(call.run().view_as(call.query), call.expected()[0])


def test_a_sequence_that_sees_nothing_gets_the_mean_of_its_values() -> None:
    """As the decode kernel has it, which replaces scores and corrects no row."""
    call = PagedCall([1], [5])
    hidden = torch.ones(1, 128, dtype=torch.bool, device="npu")
    call.changes = {
        "query": call.query.flatten(1)[:, None].npu(),
        "input_layout": "BSH",
        "sparse_mode": 0,
        "atten_mask": hidden,
        "actual_seq_lengths": None,
    }
    _, value = call.context(0)
    mean = value.mean(0).repeat_interleave(call.num_heads // call.num_kv_heads, dim=0)
    _close(call.run().view_as(call.query), mean[None])


def test_the_mask_is_a_constant() -> None:
    mask = causal_mask().cpu()
    assert mask.sum() == 2048 * 2047 // 2
    assert mask[0, 1] == 1
    assert mask[1, 0] == 0
