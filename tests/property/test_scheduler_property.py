"""The scheduler under random clients, a slow device, tiny pools and dying neighbours."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from stages.columns import i32_bytes
from stages.messages import FinishReason, SamplingParams
from tests.property.scheduler_sim import REJECTED, VOCAB_SIZE, SimulatedGroup, make_config

token_ids = st.integers(0, VOCAB_SIZE - 1)
# Few distinct beginnings, so that prompts share prefixes.
prompts = st.tuples(
    st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 1, 2], [3] * 12]),
    st.lists(token_ids, min_size=1, max_size=8),
).map(lambda parts: parts[0] + parts[1])
params = st.builds(
    lambda max_tokens, stop, prompt_logprobs, bad_word: SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=i32_bytes(stop),
        prompt_logprobs=prompt_logprobs,
        bad_word_ids=i32_bytes(bad_word),
        bad_word_lens=i32_bytes([len(bad_word)] if bad_word else []),
    ),
    st.integers(1, 14),
    st.lists(token_ids, max_size=2),
    st.sampled_from([-1, -1, -1, 0]),
    st.sampled_from([[], [], [5], [5, 6]]),
)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "params": params,
        "priority": st.integers(-1, 1),
        "cache_salt": st.sampled_from(["", "", "a"]),
        "text_stop": st.sampled_from([0, 0, 0, 1, 5]),
    }
)
configs = st.builds(
    make_config,
    device=st.sampled_from(["cpu", "emulated", "npu"]),
    overlap=st.booleans(),
    enable_prefix_caching=st.booleans(),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.integers(1, 16),
    max_preemptions=st.integers(0, 3),
    block_size=st.sampled_from([1, 2, 4]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of clients, device, network and deaths."""

    @initialize(config=configs, num_tokens=st.integers(16, 60))
    def start(self, config: Any, num_tokens: int) -> None:
        self.group = SimulatedGroup(config, num_blocks=1 + num_tokens // config.block_size)

    @rule(request=requests)
    def submit(self, request: dict[str, Any]) -> None:
        self.group.submit(**request)

    @precondition(lambda self: self.group.submitted)
    @rule(data=st.data(), more=st.lists(token_ids, min_size=1, max_size=4))
    def submit_next_turn(self, data: st.DataObject, more: list[int]) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.group.submitted)))
        prompt = self.group.conversation(request_id) + more
        self.group.submit(prompt, SamplingParams(max_tokens=3), cache_salt="")

    @precondition(lambda self: self.group.submitted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.group.abort(data.draw(st.sampled_from(sorted(self.group.submitted))))

    @rule(times=st.integers(1, 4))
    def run_steps(self, times: int) -> None:
        for _ in range(times):
            self.group.execute()
            self.group.deliver()
            self.group.check()

    @rule()
    def execute(self) -> None:
        self.group.execute()

    @rule()
    def deliver(self) -> None:
        self.group.deliver()

    @rule()
    def deliver_finish(self) -> None:
        self.group.deliver_finish()

    @rule(new_incarnation=st.booleans())
    def begin_epoch(self, new_incarnation: bool) -> None:
        self.group.begin_epoch(new_incarnation)

    @invariant()
    def is_consistent(self) -> None:
        self.group.check()

    def teardown(self) -> None:
        if hasattr(self, "group"):
            self.group.drain()
            self.group.check_outputs()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    workload=st.lists(requests, min_size=1, max_size=10),
    num_tokens=st.integers(28, 60),
    budget=st.integers(1, 12),
    device=st.sampled_from(["cpu", "emulated"]),
)
def test_one_step_ahead_gives_the_same_tokens(
    workload: list[dict[str, Any]], num_tokens: int, budget: int, device: str
) -> None:
    outputs = []
    for overlap in (False, True):
        config = make_config(overlap=overlap, max_num_batched_tokens=budget, device=device)
        group = SimulatedGroup(config, num_blocks=1 + num_tokens // 4)
        for request in workload:
            group.submit(**request)
            group.execute()
            group.deliver()
        group.drain()
        group.check_outputs()
        outputs.append((group.outputs, group.ends))
    assert outputs[0] == outputs[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lens=st.lists(
        st.tuples(st.integers(1, 6), st.integers(8, 40), st.integers(0, 1)), min_size=4, max_size=8
    ),
    max_preemptions=st.integers(0, 3),
    overlap=st.booleans(),
    block_size=st.sampled_from([1, 4]),
)
def test_everyone_ends_and_is_preempted_a_bounded_number_of_times(
    lens: list[tuple[int, int, int]], max_preemptions: int, overlap: bool, block_size: int
) -> None:
    config = make_config(
        overlap=overlap, max_preemptions=max_preemptions, block_size=block_size, max_num_seqs=6
    )
    group = SimulatedGroup(config, num_blocks=1 + 48 // block_size)
    for index, (num_prompt, max_tokens, priority) in enumerate(lens):
        prompt = [index % VOCAB_SIZE] * num_prompt
        group.submit(prompt, SamplingParams(max_tokens=max_tokens), priority)
    group.drain()
    group.check_outputs()
    assert not set(group.ends.values()) & {REJECTED, FinishReason.ABORT}


def test_next_turns_find_only_what_was_computed() -> None:
    for overlap in (False, True):
        for max_tokens in range(1, 12):
            group = SimulatedGroup(make_config(overlap=overlap), num_blocks=17)
            first = group.submit([1, 2, 3], SamplingParams(max_tokens=max_tokens))
            group.drain()
            group.submit([*group.conversation(first), 4], SamplingParams(max_tokens=2))
            group.drain()
            group.check_outputs()
