"""Train the embedded model from scratch: corpus -> BPE tokenizer -> Qwen3 weights, in one folder.

    python -m executor_svc.embedded.train --out DIR [--steps N | --minutes N] [--device cpu|cuda]

With `--steps` the run is reproducible: same seed, device and thread count, same weights.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from executor_svc.embedded import corpus, evaluate

VOCAB_SIZE = 2048
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The pre-tokenizer of Qwen2 and Qwen3: a digit is always a token of its own.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{{- message['content'] | default('', true) }}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
IGNORED = -100


@dataclass(frozen=True)
class Part:
    """One warm-up and decay of the learning rate. A part starts from the saved weights."""

    steps: int
    learning_rate: float
    # The row length of each batch in turn; only the longest holds long chats. Attention costs
    # more than all else in long rows.
    row_tokens: tuple[int, ...]


# First mostly sums, which take the most steps to learn, then mostly chats.
PARTS = (Part(2400, 2e-3, (192,) * 7 + (640,)), Part(1200, 1.5e-3, (192,) * 7 + (1024,)))
NUM_STEPS = sum(part.steps for part in PARTS)


@dataclass(frozen=True)
class Recipe:
    """The settings of a run. `minutes` or `steps` stretch the parts; `part` is the first to run."""

    out: Path
    device: str
    seed: int = 0
    part: int = 0
    steps: int = NUM_STEPS
    minutes: float | None = None
    batch_tokens: int = 2560
    warmup: float = 0.03
    eval_every: int = 300
    threads: int = 2


def train_tokenizer(seed: int, num_samples: int = 3_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` entries, learned from the first chats of the corpus."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = itertools.islice(corpus.long_chats(seed), num_samples)
    texts = (f"{m['role']}\n{m['content']}" for chat in samples for m in chat)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of 3.5 million parameters with tied embeddings, float32, fresh weights."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.03,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    end_ids = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    model.generation_config.update(do_sample=False, eos_token_id=end_ids)
    return model


class SampleEncoder:
    """Turns samples into (ids, labels); only what the model has to say carries a label."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._start, self._end, self._end_of_text = tokenizer.convert_tokens_to_ids(
            [START, END, END_OF_TEXT]
        )
        self._newline = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode(self, sample: list[corpus.Message]) -> tuple[list[int], list[int]]:
        """The ids of `sample` as the chat template renders it, and their labels."""
        ids: list[int] = []
        labels: list[int] = []
        for message in sample:
            body = self._encode(message["content"])
            if message["role"] == "given":
                ids, labels = body, [IGNORED] * len(body)
                continue
            if message["role"] == "text":
                body.append(self._end_of_text)
                return ids + body, labels + body
            head = [self._start, *self._encode(message["role"] + "\n")]
            body.append(self._end)
            is_answer = message["role"] == "assistant"
            ids += head + body + self._newline
            labels += [IGNORED] * len(head) + (body if is_answer else [IGNORED] * len(body))
            labels += [IGNORED] * len(self._newline)
        return ids, labels


@dataclass
class Batch:
    """Columns of [rows, row_tokens]. Samples share a row and never see each other."""

    ids: Tensor  # int64
    labels: Tensor  # int64, already shifted: labels[i] follows ids[i]
    positions: Tensor  # int64, from 0 in each sample
    mask: Tensor  # bool [rows, 1, row_tokens, row_tokens]

    def to(self, device: str) -> "Batch":
        return Batch(*(t.to(device) for t in (self.ids, self.labels, self.positions, self.mask)))


def pack_row(stream: Iterator[tuple[list[int], list[int]]], size: int) -> list[list[int]]:
    """Columns ids, labels, positions, segment of one row; the last sample is cut off at `size`."""
    columns: list[list[int]] = [[], [], [], []]
    segment = 0
    while len(columns[0]) < size:
        ids, labels = next(stream)
        columns[0] += ids
        columns[1] += [*labels[1:], IGNORED]
        columns[2] += range(len(ids))
        columns[3] += [segment] * len(ids)
        segment += 1
    return [column[:size] for column in columns]


def batches(recipe: Recipe, part: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """The endless stream of training batches of `recipe.seed` for one part."""
    encoder = SampleEncoder(tokenizer)
    short = map(encoder.encode, corpus.samples(recipe.seed, part))
    long = map(encoder.encode, corpus.long_chats(recipe.seed, part))
    longest = max(PARTS[part].row_tokens)
    for size in itertools.cycle(PARTS[part].row_tokens):
        stream = long if size == longest else short
        rows = [pack_row(stream, size) for _ in range(recipe.batch_tokens // size)]
        ids, labels, positions, segments = torch.tensor(rows).unbind(1)
        is_same = segments[:, :, None] == segments[:, None, :]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        yield Batch(ids, labels, positions, (is_same & causal)[:, None])


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross entropy over the labelled positions; logits are made for those alone."""
    hidden = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
    is_labelled = batch.labels != IGNORED
    logits = model.lm_head(hidden[is_labelled])
    return functional.cross_entropy(logits.float(), batch.labels[is_labelled])


def make_optimizer(model: Qwen3ForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate_at(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to zero; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.inference_mode()
def answer(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[list[corpus.Message]],
    max_new_tokens: int = 128,
) -> list[str]:
    """Greedy answers, computed in groups of prompts that have the same length (no padding)."""
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    texts = [""] * len(chats)
    for length, indices in by_length.items():
        ids = torch.tensor([prompts[i] for i in indices], device=model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens
        )
        decoded = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for index, text in zip(indices, decoded, strict=True):
            texts[index] = text
    return texts


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the bfloat16 folder next to `out`, then put it in the place of `out`."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def addition_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_questions: int = 100
) -> float:
    """The share of held-out sums that the model gets right."""
    model.eval()
    asked = evaluate.addition_questions(Random(1), num_questions)
    answers = answer(model, tokenizer, [question.messages for question in asked], 24)
    model.train()
    right = [question.is_right(text) for question, text in zip(asked, answers, strict=True)]
    return sum(right) / len(right)


def train_step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, learning_rate: float
) -> float:
    """One update of `model`; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(model.device.type, torch.bfloat16):
        loss = loss_of(model, batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def progress_of(recipe: Recipe, part: Part, step: int, seconds: float) -> float:
    """How far `part` is, from 0 to 1."""
    if recipe.minutes is not None:
        return seconds * NUM_STEPS / (60 * recipe.minutes * part.steps)
    return step * NUM_STEPS / (recipe.steps * part.steps)


def starting_point(recipe: Recipe, index: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A fresh model and tokenizer for the first part, those of `recipe.out` for a later one."""
    if index > 0:
        model = Qwen3ForCausalLM.from_pretrained(recipe.out, dtype=torch.float32)
        return model, PreTrainedTokenizerFast.from_pretrained(recipe.out)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    return build_model(tokenizer), tokenizer


def train_part(recipe: Recipe, index: int) -> None:
    """Run one part; the folder in `recipe.out` is complete after every evaluation."""
    part = PARTS[index]
    model, tokenizer = starting_point(recipe, index)
    model.to(recipe.device).train()
    optimizer = make_optimizer(model, part.learning_rate)
    started, tokens = time.monotonic(), 0
    losses: list[float] = []
    for step, batch in enumerate(batches(recipe, index, tokenizer)):
        seconds = time.monotonic() - started
        progress = progress_of(recipe, part, step, seconds)
        if progress >= 1 or (step and step % recipe.eval_every == 0):
            report = {
                "part": index,
                "step": step,
                "seconds": round(seconds),
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds),
                "loss": round(sum(losses) / len(losses), 4),
                "addition": addition_accuracy(model, tokenizer),
            }
            losses.clear()
            print(json.dumps(report), flush=True)
            save(model, tokenizer, recipe.out)
        if progress >= 1:
            return
        learning_rate = learning_rate_at(progress, part.learning_rate, recipe.warmup)
        losses.append(train_step(model, optimizer, batch.to(recipe.device), learning_rate))
        tokens += batch.ids.numel()


def train(recipe: Recipe) -> None:
    """Run all parts from `recipe.part` on."""
    for index in range(recipe.part, len(PARTS)):
        train_part(recipe, index)


def parse(arguments: list[str] | None = None) -> Recipe:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of all parts together")
    parser.add_argument("--minutes", type=float, help="train by the clock, not by steps")
    parser.add_argument(
        "--part",
        type=int,
        choices=range(len(PARTS)),
        default=Recipe.part,
        help="the part to start with; from 1 on it continues the folder in --out",
    )
    return Recipe(**vars(parser.parse_args(arguments)))


def main() -> None:
    recipe = parse()
    torch.set_num_threads(recipe.threads)
    logging.disable_progress_bar()
    train(recipe)


if __name__ == "__main__":
    main()
