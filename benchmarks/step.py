"""What one decode step costs the host, by number of rows, without device and channels.

Times the scheduler (tokens in, plan out), the codec (plan and tokens, both ways) and
`PersistentBatch.apply` in steady decode. Near-constant cost is the point of the persistent batch.
"""

from __future__ import annotations

import argparse
from time import perf_counter_ns

import msgspec
import numpy as np

from scheduler_svc.stage import SchedulerStage
from stages.columns import i32_bytes
from stages.config import ModelFacts, ServerConfig
from stages.messages import (
    BeginEpoch,
    ExecuteStep,
    ExecutorFacts,
    PlanRecord,
    SamplingParams,
    StepTokens,
    TokenizedRequest,
    TokenRecord,
)
from stages.persistent_batch import PersistentBatch

BLOCK_SIZE = 16
PROMPT_LEN = 32
PARTS = ("scheduler", "codec", "apply")

_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(PlanRecord)
_token_decoder = msgspec.msgpack.Decoder(TokenRecord)


def start(num_rows: int, num_steps: int) -> tuple[SchedulerStage, ExecuteStep]:
    """A stage with `num_rows` admitted requests, and its first step."""
    max_model_len = PROMPT_LEN + num_steps + 16
    config = ServerConfig(
        model="m",
        served_model_name="m",
        facts=ModelFacts("A", 32000, max_model_len, [0]),
        run_dir="",
        max_model_len=max_model_len,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * PROMPT_LEN,
        block_size=BLOCK_SIZE,
        overlap=False,
    )
    stage = SchedulerStage(config)
    num_blocks = 1 + num_rows * -(-max_model_len // BLOCK_SIZE)
    stage.begin_epoch(BeginEpoch(1, ExecutorFacts(num_blocks, BLOCK_SIZE, 32000, 1)))
    params = SamplingParams(max_tokens=num_steps + 8, stop_token_ids=i32_bytes([0]))
    rng = np.random.default_rng(0)
    (step,) = stage.handle(
        [
            TokenizedRequest(i + 1, 1, i32_bytes(rng.integers(1, 32000, PROMPT_LEN)), params)
            for i in range(num_rows)
        ],
        now_ns=0,
    )
    assert isinstance(step, ExecuteStep)
    return stage, step


def measure(num_rows: int, num_steps: int) -> dict[str, float]:
    """Mean microseconds a step, by part; the mean has the steps in it in which rows grow."""
    stage, plan = start(num_rows, num_steps)
    batch = PersistentBatch(num_rows)
    token_ids = i32_bytes(np.full(num_rows, 7, dtype=np.int32))
    spent = dict.fromkeys(PARTS, 0)
    for index in range(num_steps):
        times = [perf_counter_ns()]
        rows = batch.apply(plan)
        times.append(perf_counter_ns())
        tokens = StepTokens(plan.step_id, i32_bytes(rows.sampled_rows), token_ids)
        tokens = _token_decoder.decode(_encoder.encode(tokens))
        times.append(perf_counter_ns())
        (plan,) = stage.handle([tokens], now_ns=0)
        times.append(perf_counter_ns())
        plan = _plan_decoder.decode(_encoder.encode(plan))
        times.append(perf_counter_ns())
        if index >= 2:  # the first step is prefill, the second starts the rows
            apply_ns, token_ns, scheduler_ns, plan_ns = np.diff(times).tolist()
            spent["apply"] += apply_ns
            spent["codec"] += token_ns + plan_ns
            spent["scheduler"] += scheduler_ns
    return {part: spent[part] / (num_steps - 2) / 1000 for part in PARTS}


def main() -> None:
    """Print one line a number of rows, and the growth from 64 to 1024."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    num_steps = parser.parse_args().steps
    print(f"{'rows':>5} " + " ".join(f"{part:>10}" for part in (*PARTS, "total")) + "   [us/step]")
    totals = {}
    for num_rows in (1, 8, 64, 256, 1024):
        spent = measure(num_rows, num_steps)
        totals[num_rows] = sum(spent.values())
        figures = [*spent.values(), totals[num_rows]]
        print(f"{num_rows:>5} " + " ".join(f"{figure:>10.1f}" for figure in figures))
    print(f"growth from 64 to 1024 rows: {totals[1024] / totals[64]:.2f}x")


if __name__ == "__main__":
    main()
