"""The wiring of a process group: which stages there are, what runs them, which rings tie them.

Code of a stage is named by a string and imported only in that stage's own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GATEWAY = "gateway"
TOKENIZER = "tokenizer"
SCHEDULER = "scheduler"
EXECUTOR = "executor"
SAMPLER = "sampler"


@dataclass(frozen=True)
class StageSpec:
    """`main`: 'module:function' that runs the process. `core`: makes the pure stage for replay."""

    name: str
    main: str
    core: str


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(GATEWAY, "gateway_svc.main:main", "gateway_svc.main:make_core"),
        StageSpec(TOKENIZER, "tokenizer_svc.main:main", "tokenizer_svc.main:make_core"),
        StageSpec(SCHEDULER, "scheduler_svc.main:main", "scheduler_svc.main:make_core"),
        StageSpec(EXECUTOR, "executor_svc.main:main", "executor_svc.main:make_core"),
        StageSpec(SAMPLER, "sampler_svc.main:main", "sampler_svc.main:make_core"),
    )
}

# The stages that hold state of requests and so begin a new epoch together.
EPOCH_STAGES = (SCHEDULER, EXECUTOR, SAMPLER)


def gateway_names(num_gateways: int) -> list[str]:
    """The stages that speak HTTP, by their number: gateway, gateway-1, gateway-2, ..."""
    return [GATEWAY, *(f"{GATEWAY}-{index}" for index in range(1, num_gateways))]


def gateway_index(stage: str) -> int:
    """The number of a gateway by its name."""
    return int(stage.partition("-")[2] or 0)


def is_gateway(stage: str) -> bool:
    """Whether a stage is one of the gateways."""
    return spec_of(stage).name == GATEWAY


def spec_of(stage: str) -> StageSpec:
    """What runs a stage."""
    return STAGES[stage.partition("-")[0]]


def stage_names(num_gateways: int) -> list[str]:
    """All stages of a group, in the order of the work; a group is stopped in it, so that no stage
    writes to a closed one.
    """
    return [*gateway_names(num_gateways), TOKENIZER, SCHEDULER, EXECUTOR, SAMPLER]


@dataclass(frozen=True)
class RingSpec:
    """One writer, many readers."""

    name: str
    writer: str
    readers: tuple[str, ...]


PLAN_RING = "plan"
TOKEN_RING = "tokens"
LOGITS_RING = "logits"


def rings(sampling_placement: str) -> tuple[RingSpec, ...]:
    """Give the rings of a group for placement 'device' or 'process'."""
    plan = RingSpec(PLAN_RING, SCHEDULER, (EXECUTOR, SAMPLER))
    if sampling_placement == "device":
        return plan, RingSpec(TOKEN_RING, EXECUTOR, (SCHEDULER, SAMPLER))
    return (
        plan,
        RingSpec(LOGITS_RING, EXECUTOR, (SAMPLER,)),
        RingSpec(TOKEN_RING, SAMPLER, (SCHEDULER, EXECUTOR)),
    )


def inbox_address(run_dir: str, stage: str) -> str:
    """Where a stage's ZMQ inbox is bound."""
    return f"ipc://{Path(run_dir) / stage}.in"


def status_path(run_dir: str) -> Path:
    """The Unix socket on which the supervisor tells the group's state."""
    return Path(run_dir) / "status.sock"
