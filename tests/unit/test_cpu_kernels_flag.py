"""--cpu-kernels: who takes it, and that it reaches the kernels and the sampling head."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from executor_svc.make_model import make_model
from executor_svc.perplexity import print_perplexity
from sampler_svc.native.head import NativeHead
from sampler_svc.native.library import load_library
from sampler_svc.sampling_head import SamplingHead, make_sampling_head
from sampler_svc.torch_head import TorchHead
from sampler_svc.uploads import upload_to
from stages.bench.latency import latency_config
from stages.bench.steps import Options, serve_arguments
from stages.cli import make_parser
from stages.errors import ConfigError
from stages.eval_embedded import eval_embedded
from stages.native_library import BUILDS, LibraryUnavailable, processor_flags

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "command",
    ["serve", "check-model", "perplexity", "eval-embedded", "bench steps", "bench latency"],
)
def test_every_command_that_computes_on_the_cpu_takes_it(command: str) -> None:
    parse = make_parser().parse_args
    assert parse([*command.split(), "--cpu-kernels", "avx2"]).cpu_kernels == "avx2"
    with pytest.raises(SystemExit):
        parse([*command.split(), "--cpu-kernels", "avx3"])


def test_benchmarks_pass_it_on() -> None:
    words = ("steps", "--cpu-kernels", "torch")
    given = make_parser().parse_args(["bench", *words])
    options = Options(None, "cpu", False, given.cpu_kernels, 1, 1, [1], 1, 1, None, None, None)
    assert serve_arguments(options)[:2] == ["--cpu-kernels", "torch"]
    given = make_parser().parse_args(["bench", "latency", "--cpu-kernels", "avx2"])
    assert latency_config(vars(given)).cpu_kernels == "avx2"


def test_an_evaluation_of_a_running_server_refuses_it() -> None:
    with pytest.raises(ConfigError, match="--cpu-kernels is for the server"):
        eval_embedded(1, "http://127.0.0.1:1", None, ["--cpu-kernels", "avx2"])


def _head(kernels: str) -> SamplingHead:
    return make_sampling_head(CPU, 100, 1, upload_to(CPU), kernels)


def test_the_sampling_head_is_of_the_same_build(caplog: pytest.LogCaptureFixture) -> None:
    try:
        load_library(choice="baseline")
    except (LibraryUnavailable, ConfigError) as unavailable:
        pytest.skip(str(unavailable))
    assert isinstance(_head("baseline"), NativeHead)
    with caplog.at_level(logging.INFO):
        assert isinstance(_head("torch"), TorchHead)
    assert caplog.text == ""
    foreign = next(build.name for build in BUILDS if not build.needs <= processor_flags())
    with pytest.raises(ConfigError, match=f"--cpu-kernels {foreign}"):
        _head(foreign)


def test_perplexity_computes_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model("tiny-qwen3", tmp_path / "tiny", vocab_size=512)
    (tmp_path / "text").write_text("some words to predict")
    with caplog.at_level(logging.INFO):
        print_perplexity(tmp_path / "tiny", str(tmp_path / "text"), "float32", 8, None, "torch")
    assert "CPU backend: torch, as --cpu-kernels says" in caplog.text
