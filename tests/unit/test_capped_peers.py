"""Peers as on a processor without AVX512-BF16: what is hidden from them, and what is checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import CannotRun, Setup, parse_contender
from benchmarks.server import (
    CAPPED,
    Peer,
    ServerFailed,
    headrace,
    loaded_libraries,
    serving,
    vllm,
    without_bf16,
)

FAKE = """
def get_capabilities():
    return {"avx512_f": True, "avx512_bf16": True, "amx_tile": True}
def _is_avx512_bf16_supported():
    return get_capabilities().get("avx512_bf16", False)
"""
SCRIPT = """
import torch.cpu, json
print(json.dumps([torch.cpu._is_avx512_bf16_supported(), torch.cpu.get_capabilities()["avx512_f"],
                  torch.cpu.get_capabilities()["amx_tile"]]))
"""
SERVER = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Healthy).serve_forever()
"""


def test_torch_says_that_there_is_no_bf16(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "cpu.py").write_text(FAKE)
    path = os.pathsep.join((str(CAPPED), str(tmp_path)))
    for paths, printed in ((path, "[false, true, false]"), (str(tmp_path), "[true, true, true]")):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.strip() == printed, done.stderr


def test_the_real_torch_has_what_is_wrapped() -> None:
    found = torch.cpu.get_capabilities()
    assert torch.cpu._is_avx512_bf16_supported() == found.get("avx512_bf16", False)
    assert torch.cpu._is_amx_tile_supported() == found.get("amx_tile", False)


def test_both_sides_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = without_bf16(headrace(Path("model")))
    assert ours.command[-2:] == ["--cpu-kernels", "avx512"]
    assert ours.library == "libheadrace_avx512.so"
    monkeypatch.setenv("PYTHONPATH", "mine")
    theirs = without_bf16(vllm(Path("venv"), Path("model")))
    assert theirs.environment["PYTHONPATH"] == f"{CAPPED}{os.pathsep}mine"
    assert theirs.environment["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert theirs.environment["VLLM_TARGET_DEVICE"] == "cpu"


def test_what_cannot_be_capped_is_left_out_and_says_why() -> None:
    setup = Setup(Path("model"), Path("gguf"), 1, 100, without_bf16=True)
    with pytest.raises(CannotRun, match="when it is compiled"):
        parse_contender("llama-server:bf16").peer(setup)
    assert "avx512" in parse_contender("headrace:bfloat16").peer(setup).command


def test_a_server_on_another_library_is_not_measured() -> None:
    command = [sys.executable, "-c", SERVER]
    with serving(Peer("fake", command)) as server:
        library = next(name for name in loaded_libraries(server.pid) if ".so" in name)
    with serving(Peer("fake", command, library=library)):
        pass
    wrong = Peer("fake", command, library="libheadrace_none.so")
    with pytest.raises(ServerFailed, match="does not run on libheadrace_none"), serving(wrong):
        pass
