"""The sampler's process: core and wiring."""

from __future__ import annotations

from sampler_svc.stage import SamplerStage
from stages.config import ServerConfig
from stages.launch import StageContext
from stages.messages import (
    FinishRequest,
    OutputLogprobs,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    StepLogprobs,
    StepTokens,
    TextOutputs,
)
from stages.runner import Wiring, run_stage
from stages.stage import Stage
from stages.topology import GATEWAY, SCHEDULER, TOKEN_RING

TO_GATEWAY = (RequestStarted, PromptLogprobs, OutputLogprobs, TextOutputs, RequestRejected)

WIRING = Wiring(
    to_ring={StepTokens: TOKEN_RING, StepLogprobs: TOKEN_RING},
    to_stage={FinishRequest: SCHEDULER, **{kind: GATEWAY for kind in TO_GATEWAY}},
)


def make_core(config: ServerConfig, incarnation: int) -> Stage:
    """Build the pure stage; `incarnation` plays no role in it."""
    return SamplerStage(config)


def main(context: StageContext) -> None:
    """Run until told to stop."""
    run_stage(context, lambda: make_core(context.config, context.incarnation), WIRING)
