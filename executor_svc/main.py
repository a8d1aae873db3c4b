"""The executor's process: makes the core of its device, then runs it.

Imports no torch by itself: the emulated device starts at once.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from executor_svc.emulated import EmulatedExecutorStage, emulated_facts, load_choices
from stages.config import ServerConfig
from stages.launch import StageContext
from stages.messages import (
    ExecutorFacts,
    StepLogits,
    StepLogprobs,
    StepPromptLogprobs,
    StepTokens,
)
from stages.runner import Runner, Wiring
from stages.stage import Stage
from stages.topology import LOGITS_RING, TOKEN_RING
from stages.trace import Trace
from stages.traced import TracedDevice

if TYPE_CHECKING:
    from executor_svc.kv_cache import KvCache

logger = logging.getLogger(__name__)


def make_core(config: ServerConfig, incarnation: int) -> Stage:
    """Build the pure stage for replay: same model, same rows, and so the same tokens."""
    core, _ = _make(config, incarnation, Trace())
    return core


def main(context: StageContext) -> None:
    """Run until told to stop."""
    started = time.monotonic()
    trace = Trace()
    core, facts = _make(context.config, context.incarnation, trace)
    logger.info("init engine took %.2f seconds", time.monotonic() - started)
    Runner(context, core, wiring(context.config), trace).run(facts)


def wiring(config: ServerConfig) -> Wiring:
    """Where tokens or logits go."""
    # One record a turn: the tokens of a step leave before the next step begins.
    ring = TOKEN_RING if config.sampling_placement == "device" else LOGITS_RING
    kinds = (StepTokens, StepLogprobs, StepPromptLogprobs, StepLogits)
    return Wiring(to_ring=dict.fromkeys(kinds, ring), records_per_turn=1)


def _make(config: ServerConfig, incarnation: int, trace: Trace) -> tuple[Stage, ExecutorFacts]:
    """The core of the configured device, and its facts; `trace` takes the device's steps."""
    if config.device == "emulated":
        emulated = EmulatedExecutorStage(config, load_choices(config), trace)
        return emulated, emulated_facts(config, incarnation)
    core, kv_cache = _make_computing(config, trace)
    facts = ExecutorFacts(
        num_blocks=kv_cache.num_blocks,
        block_size=kv_cache.block_size,
        vocab_size=config.facts.vocab_size,
        incarnation=incarnation,
    )
    return core, facts


def _make_computing(config: ServerConfig, trace: Trace) -> tuple[Stage, KvCache]:
    """The core of a device that runs a model; torch is imported here and not before."""
    if config.device != "cpu":
        from executor_svc.accelerator.loading import load_stage

        return load_stage(config, trace)
    from executor_svc.loading import load
    from executor_svc.stage import ExecutorStage

    model, kv_cache = load(config)
    # Here the process is the device: it computes as long as its core is busy.
    return TracedDevice(ExecutorStage(config, model, kv_cache), trace), kv_cache
