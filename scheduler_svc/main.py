"""The scheduler's process: core and wiring."""

from __future__ import annotations

from scheduler_svc.stage import SchedulerStage
from stages.config import ServerConfig
from stages.launch import StageContext
from stages.messages import EndRequests, ExecuteStep, RejectRequest, SchedulerInbound
from stages.runner import Wiring, run_stage
from stages.stage import Stage
from stages.topology import PLAN_RING

WIRING = Wiring(
    inbox=SchedulerInbound,
    to_ring={kind: PLAN_RING for kind in (ExecuteStep, EndRequests, RejectRequest)},
)


def make_core(config: ServerConfig, incarnation: int) -> Stage:
    """Build the pure stage; `incarnation` plays no role in it."""
    return SchedulerStage(config)


def main(context: StageContext) -> None:
    """Run until told to stop."""
    run_stage(context, lambda: make_core(context.config, context.incarnation), WIRING)
