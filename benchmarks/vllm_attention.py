"""vLLM's CPU attention kernel, timed in vLLM's own environment for `attention_vs_vllm`.

`PYTHON -P vllm_attention.py FILE`: FILE is a safetensors file with `query` [seqs, heads, dim] and
`key`, `value` [copies, seqs, tokens, kv_heads, dim]. Answers each line of its input with a line:
`check FILE` writes the output of the first copy there, a number measures for so many seconds and
answers with the best time of a call. Imports nothing of ours.
"""

from __future__ import annotations

import sys
import time
from itertools import cycle

import torch
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

# What its server takes by default.
BLOCK_SIZE = 128


class Decode:
    """One query a sequence at the end of its context, over copies that no cache holds all."""

    def __init__(self, arrays: dict[str, torch.Tensor]) -> None:
        self.query = arrays["query"]
        self.output = torch.empty_like(self.query)
        num_seqs, num_heads, dim = self.query.shape
        copies, _, tokens, num_kv_heads, _ = arrays["key"].shape
        self._seq_lens = torch.full((num_seqs,), tokens, dtype=torch.int32)
        self._starts = torch.arange(num_seqs + 1, dtype=torch.int32)
        self._scale = dim**-0.5
        isa = _get_attn_isa(self.query.dtype, BLOCK_SIZE, dim, "auto")
        self._plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            seq_lens=self._seq_lens,
            dtype=self.query.dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        per_seq = tokens // BLOCK_SIZE
        blocks = torch.randperm(num_seqs * per_seq, generator=torch.Generator().manual_seed(0))
        self._table = blocks.view(num_seqs, per_seq).to(torch.int32)
        slots = blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        shape = (num_seqs * per_seq, num_kv_heads, 2 * BLOCK_SIZE, dim)
        self._caches = [
            torch.zeros(shape, dtype=self.query.dtype).chunk(2, 2) for _ in range(copies)
        ]
        for index, (key_cache, value_cache) in enumerate(self._caches):
            key, value = (arrays[name][index].flatten(0, 1) for name in ("key", "value"))
            ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots.flatten(), isa)
        self._turns = cycle(range(copies))

    def run(self, copy: int) -> None:
        key_cache, value_cache = self._caches[copy]
        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=self.output,
            query_start_loc=self._starts,
            seq_lens=self._seq_lens,
            scale=self._scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._table,
            softcap=0.0,
            scheduler_metadata=self._plan,
            s_aux=None,
        )

    def best(self, seconds: float) -> float:
        found, end = float("inf"), time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            self.run(next(self._turns))
            found = min(found, time.perf_counter() - begin)
        return found


def main() -> None:
    """Answer until the input ends."""
    decode = Decode(load_file(sys.argv[1]))
    for line in sys.stdin:
        order, _, file = line.strip().partition(" ")
        if order == "check":
            decode.run(0)
            save_file({"output": decode.output}, file)
            print("done", flush=True)
        else:
            print(decode.best(float(order)), flush=True)


if __name__ == "__main__":
    main()
