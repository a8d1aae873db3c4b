"""Makes the recordings that `test_recordings.py` replays: `python -m tests.replay.record`.

To be run after every wanted change of messages, of the embedded model or of what a stage says; the
difference is then reviewed like code.
"""

from __future__ import annotations

from pathlib import Path

from stages.config import EMBEDDED_MODEL
from stages.messages import ChatMessage, ChatPrompt, SamplingParams, TextPrompt
from stages.model_folder import embedded_model
from stages.topology import EXECUTOR, SAMPLER, STAGES, TOKENIZER
from tests.pipeline import Pipeline, make_config

HERE = Path(__file__).parent
PLACEMENTS = ("device", "process")


def record(folder: Path, placement: str) -> None:
    """Run one eventful minute of a small pipeline with all stages recorded."""
    folder.mkdir(exist_ok=True)
    for stage in STAGES:
        (folder / stage).unlink(missing_ok=True)
    config = make_config(
        embedded_model(),
        model=EMBEDDED_MODEL,
        sampling_placement=placement,
        max_model_len=256,
        max_num_seqs=6,
        max_num_batched_tokens=48,
        num_blocks=24,
    )
    pipeline = Pipeline(config, seed=7, record_to=folder)
    # Logits are large: in placement `process` the requests are short.
    leaver = _open_requests(pipeline, length=40 if placement == "device" else 10)
    trouble = {30: TOKENIZER, 70: SAMPLER, 110: EXECUTOR}

    def on_turn(turn: int) -> None:
        if turn == 20:
            pipeline.close(leaver)
        if turn in trouble:
            pipeline.kill(trouble[turn])

    pipeline.run(on_turn)
    assert all(o.num_terminals for i, o in pipeline.outcomes.items() if i != leaver)


def _open_requests(pipeline: Pipeline, length: int) -> int:
    """One request of every kind; returns the id of the one whose client will leave."""
    question = ChatPrompt([ChatMessage("user", "What is 12 plus 34?")])
    story = ChatPrompt([ChatMessage("user", "Tell me a story about a fox and a river.")])
    greedy = SamplingParams(max_tokens=length // 2, temperature=0.0)
    pipeline.open(question, greedy)
    bad_words = ["river", "the fox"]
    pipeline.open(
        story,
        SamplingParams(max_tokens=length, temperature=0.9, top_p=0.9, seed=1, bad_words=bad_words),
    )
    pipeline.open(
        story, SamplingParams(max_tokens=length, top_k=20, min_p=0.05, seed=2, logprobs=3)
    )
    pipeline.open(
        TextPrompt("Once upon a time there was"),
        SamplingParams(max_tokens=length, temperature=0.0, stop=[". ", "river"], min_tokens=4),
        priority=-1,
    )
    pipeline.open(
        TextPrompt("The wheel never stands still. " * 3),
        SamplingParams(
            max_tokens=8, temperature=0.0, prompt_logprobs=1, echo=True, frequency_penalty=0.5
        ),
    )
    pipeline.open(TextPrompt("x " * 400), greedy)  # too long: refused
    pipeline.open(question, greedy, priority=5)
    return pipeline.open(story, SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))


if __name__ == "__main__":
    for name in PLACEMENTS:
        record(HERE / name, name)
        sizes = {stage: (HERE / name / stage).stat().st_size for stage in STAGES}
        print(name, sizes)
