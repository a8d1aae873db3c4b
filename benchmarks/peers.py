"""The servers that `vs_peers_cpu` compares: how each is started, and what it cannot do.

A contender is named KIND:TYPE, such as `llama-server:bf16`. Nothing of a peer's code is here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.server import MODEL_NAME, Peer, headrace, vllm, without_bf16

ROOT = Path(__file__).parents[1]
BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "f32": 4.0,
    "bfloat16": 2.0,
    "bf16": 2.0,
    "float16": 2.0,
    "f16": 2.0,
    "int8": 1.0,
    "q8_0": 34 / 32,  # 32 weights of one byte and a scale of two
}
# By default it penalizes repetition. It also knows no `ignore_eos`: the ends get a bias instead.
LLAMA_PYTHON_EXTRA: dict[str, object] = {"repeat_penalty": 1.0, "top_k": 1}


class CannotRun(Exception):
    """A contender cannot be started here; the text says what is missing."""


@dataclass(frozen=True)
class Setup:
    """What the servers are started with: paths, and the largest load that will come.

    `context` is the longest request, prompt and answer, in tokens. `without_bf16`: as on a
    processor with AVX512 but neither AVX512-BF16 nor AMX.
    """

    model: Path
    gguf_folder: Path
    max_num_seqs: int
    context: int
    eos_token_ids: tuple[int, ...] = ()
    vllm_venv: Path | None = None
    llama_venv: Path | None = None
    llama_server: Path | None = None
    without_bf16: bool = False


@dataclass(frozen=True)
class Contender:
    """One row of the table. `is_serial`: it answers one request at a time."""

    kind: str
    type: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.kind}:{self.type}"

    @property
    def is_serial(self) -> bool:
        """Whether its throughput cannot grow with the number of clients."""
        return self.kind == "llama-cpp-python"

    @property
    def bytes_per_weight(self) -> float:
        """What a step reads of each weight of a matrix."""
        return BYTES_PER_WEIGHT[self.type]

    @property
    def is_bfloat16(self) -> bool:
        """Whether it may take the processor's dot products of bfloat16."""
        return self.type in ("bfloat16", "bf16")

    @property
    def kv_bytes(self) -> int:
        """Of one value in the KV cache; llama.cpp keeps 16 bits whatever the weights."""
        return 4 if self.type == "float32" else 2

    def peer(self, setup: Setup) -> Peer:
        """Give the server's command; converts the model where that is needed.

        Raises:
            CannotRun: a path is not given, the conversion fails, or it cannot be capped.
        """
        if setup.without_bf16 and self.kind in _FIXED_WHEN_COMPILED:
            raise CannotRun(
                "llama.cpp chooses its instructions when it is compiled: no --without-bf16"
            )
        peer = replace(_KINDS[self.kind](self.type, setup), name=self.name)
        return without_bf16(peer) if setup.without_bf16 else peer


def parse_contender(text: str) -> Contender:
    """Read KIND:TYPE; raises `ValueError` with the known names."""
    kind, _, type_name = text.partition(":")
    if kind not in _KINDS or type_name not in TYPES[kind]:
        known = ", ".join(f"{kind}:{{{','.join(types)}}}" for kind, types in TYPES.items())
        raise ValueError(f"--peers: {text!r} is not known; known are {known}")
    return Contender(kind, type_name)


def _headrace(type_name: str, setup: Setup) -> Peer:
    if type_name == "int8":
        flags = ["--dtype", "bfloat16", "--quantization", "int8"]
    else:
        flags = ["--dtype", type_name]
    return headrace(setup.model, *flags, *_limits(setup))


def _vllm(type_name: str, setup: Setup) -> Peer:
    venv = _given(setup.vllm_venv, "--vllm-venv")
    return vllm(venv, setup.model, "--dtype", type_name, *_limits(setup))


def _limits(setup: Setup) -> list[str]:
    return ["--max-num-seqs", str(setup.max_num_seqs), "--max-model-len", str(setup.context)]


def _llama_server(type_name: str, setup: Setup) -> Peer:
    """llama.cpp's own server: a slot for each client, each with room for the longest request."""
    program = _given(setup.llama_server, "--llama-server")
    command = [str(program), "--model", str(_gguf(type_name, setup)), "--alias", MODEL_NAME]
    command += ["--threads", _threads(), "--parallel", str(setup.max_num_seqs)]
    command += ["--ctx-size", str(setup.max_num_seqs * setup.context)]
    return Peer("", command)


def _llama_python(type_name: str, setup: Setup) -> Peer:
    venv = _given(setup.llama_venv, "--llama-venv")
    command = [str(venv / "bin" / "python"), "-m", "llama_cpp.server"]
    command += ["--model", str(_gguf(type_name, setup)), "--model_alias", MODEL_NAME]
    command += ["--n_threads", _threads(), "--n_threads_batch", _threads()]
    command += ["--n_ctx", str(setup.context), "--interrupt_requests", "False"]
    bias = {str(token): -100.0 for token in setup.eos_token_ids}
    extra = LLAMA_PYTHON_EXTRA | {"logit_bias": bias}
    return Peer("", command, health="/v1/models", extra=extra)


def _given(path: Path | None, flag: str) -> Path:
    if path is None:
        raise CannotRun(f"{flag} is not given (docs/peers.md says how to get it)")
    if not path.exists():
        raise CannotRun(f"{flag}: {path} does not exist (docs/peers.md says how to get it)")
    # Not resolved: a virtual environment is known by its own path.
    return path.absolute()


def _gguf(type_name: str, setup: Setup) -> Path:
    """Give the model as a file of that type; made at the first use, by the Python of llama.cpp."""
    file = setup.gguf_folder / f"{setup.model.name}-{type_name}.gguf"
    newest = max((each.stat().st_mtime for each in setup.model.glob("*.safetensors")), default=0.0)
    if not file.exists() or file.stat().st_mtime < newest:
        python = _given(setup.llama_venv, "--llama-venv") / "bin" / "python"
        setup.gguf_folder.mkdir(parents=True, exist_ok=True)
        command = [str(python), "-m", "benchmarks.to_gguf", str(setup.model), str(file.absolute())]
        command += ["--type", type_name.upper()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotRun(f"no GGUF of this model: {done.stderr.strip()[-500:]}")
    return file


def _threads() -> str:
    return str(len(os.sched_getaffinity(0)))


_KINDS: dict[str, Callable[[str, Setup], Peer]] = {
    "headrace": _headrace,
    "vllm": _vllm,
    "llama-server": _llama_server,
    "llama-cpp-python": _llama_python,
}
_FIXED_WHEN_COMPILED = ("llama-server", "llama-cpp-python")
_GGUF_TYPES = ("bf16", "f16", "f32", "q8_0")
TYPES: dict[str, tuple[str, ...]] = {
    "headrace": ("bfloat16", "float16", "float32", "int8"),
    "vllm": ("bfloat16", "float16", "float32"),
    "llama-server": _GGUF_TYPES,
    "llama-cpp-python": _GGUF_TYPES,
}
