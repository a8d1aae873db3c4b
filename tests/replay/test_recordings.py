"""Every stage says today what it said when it was recorded, byte for byte."""

from __future__ import annotations

import pytest
import torch

from stages.launch import load
from stages.replay import replay
from stages.topology import STAGES
from tests.replay.record import HERE, PLACEMENTS


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_replay(placement: str, stage: str) -> None:
    torch.set_num_threads(1)
    result = replay(stage, HERE / placement / stage, load(STAGES[stage].core))
    assert result.num_inbound > 5 and result.num_outbound > 5
