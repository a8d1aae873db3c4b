"""How the kernels get into an installation, are found there, and what happens without them."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from executor_svc.make_model import make_model
from executor_svc.model_config import load_model_config
from executor_svc.models import cpu
from executor_svc.models.decoder import Decoder
from executor_svc.models.fused_decoder import FusedDecoder
from executor_svc.ops.native.library import (
    BUILDS,
    LibraryUnavailable,
    load_library,
    processor_flags,
)
from sampler_svc.native.library import load_library as load_sampling_library
from stages.errors import ConfigError
from stages.native_library import find_build
from tests.unit.native_models import best_build

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "executor_svc" / "ops" / "native"
SAMPLING_SOURCES = ROOT / "sampler_svc" / "native"
# Each includes all sources of its library.
DRIVERS = ("native_driver.c", "sampling_driver.c")
ARCHITECTURE = {
    "avx512bf16": "cooperlake",
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
    "neon_bf16": "armv8.2-a+dotprod+bf16",
    "neon_dotprod": "armv8.2-a+dotprod",
}


def _compiler() -> str:
    name = os.environ.get("CC", "gcc").split()[0]
    found = shutil.which(name) or shutil.which("cc")
    if found is None:
        pytest.skip("this machine has no C compiler")
    return found


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    built, objects = folder / "lib", folder / "temp"
    words = ("setup.py", "-q", "build_ext", "--build-lib", built, "--build-temp", objects)
    return _run(sys.executable, *words, **environment)


def test_a_build_holds_every_variant_for_this_machine(tmp_path: Path) -> None:
    _compiler()
    result = _build(tmp_path, CFLAGS="-O0")
    assert result.returncode == 0, result.stderr
    built = {path.name for path in tmp_path.rglob("*.so")}
    builds = [build for build in BUILDS if build.machine in ("", platform.machine())]
    names = ("headrace", "sampling")
    assert built == {build.file_name(name) for build in builds for name in names}
    library = load_library(tmp_path / "lib" / SOURCES.relative_to(ROOT))
    assert f"libheadrace_{library.name}.so" in built
    sampling = load_sampling_library(tmp_path / "lib" / SAMPLING_SOURCES.relative_to(ROOT))
    assert sampling.name == library.name


def test_without_a_compiler_the_build_succeeds_and_is_empty(tmp_path: Path) -> None:
    result = _build(tmp_path, CC="no-such-compiler", LDSHARED="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert [*tmp_path.rglob("*.so")] == []


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_kernels_are_clean_under_sanitizers(
    sanitizer: str, driver: str, tmp_path: Path
) -> None:
    """The driver runs every kernel on blocks of exact size, and the pool with several threads."""
    program = tmp_path / "driver"
    best = next(build for build in BUILDS if build.needs <= processor_flags())
    machine = [f"-march={ARCHITECTURE[best.name]}"] if best.needs else []
    flags = ["-std=gnu11", "-O1", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}", *machine]
    source = Path(__file__).with_name(driver)
    folders = (f"-I{SOURCES}", f"-I{SAMPLING_SOURCES}")
    compiled = _run(_compiler(), *flags, *folders, source, "-o", program, "-lm", "-lpthread")
    if "cannot find" in compiled.stderr and "san" in compiled.stderr:
        pytest.skip(f"the compiler has no runtime for -fsanitize={sanitizer}")
    assert compiled.returncode == 0, compiled.stderr
    ran = _run(program)
    assert ran.returncode == 0, ran.stderr


def test_the_best_build_for_the_processor_is_loaded(tmp_path: Path) -> None:
    best_build()
    for flags, name in ((frozenset[str](), "baseline"), (processor_flags(), None)):
        library = load_library(flags=flags)
        assert name in (None, library.name)
        needs = {build.name: build.needs for build in BUILDS}[library.name]
        assert needs <= flags
    shutil.copy(SOURCES / "libheadrace_baseline.so", tmp_path)
    assert load_library(tmp_path).name == "baseline"


def test_without_the_dot_instruction_the_next_best_build_is_loaded() -> None:
    """The first build that a processor lacks a flag for is passed over, not tried."""
    best_build()
    if not processor_flags() >= BUILDS[1].needs:
        pytest.skip("this processor has no AVX512")
    for missing in BUILDS[0].needs - BUILDS[1].needs:
        assert load_library(flags=processor_flags() - {missing}).name == BUILDS[1].name


def _install(folder: Path, *names: str) -> Path:
    """Empty files in the place of builds: finding does not look into them."""
    for name in names:
        (folder / f"libheadrace_{name}.so").write_bytes(b"")
    return folder


def test_the_chosen_build_is_taken_though_a_better_one_is_there(tmp_path: Path) -> None:
    every = frozenset[str]().union(*(build.needs for build in BUILDS))
    _install(tmp_path, "avx512", "avx2", "baseline")
    for choice, found in (("auto", "avx512"), ("avx2", "avx2"), ("baseline", "baseline")):
        build, path = find_build(tmp_path, "headrace", every, choice)
        assert (build.name, path.name) == (found, f"libheadrace_{found}.so")


def test_a_build_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    flags = BUILDS[1].needs
    _install(tmp_path, "avx512bf16", "avx512", "baseline")
    lacks = r"avx512bf16: this processor lacks avx512_bf16, .*; there are auto, avx512, baseline,"
    with pytest.raises(ConfigError, match=f"--cpu-kernels {lacks}"):
        find_build(tmp_path, "headrace", flags, "avx512bf16")
    with pytest.raises(ConfigError, match=r"avx2: it was not compiled .* avx512, baseline,"):
        find_build(tmp_path, "headrace", flags | {"avx2"}, "avx2")
    with pytest.raises(ConfigError, match=r"baseline: it was not compiled .*; there are auto, to"):
        find_build(tmp_path / "empty", "headrace", flags, "baseline")


def test_an_installation_without_kernels_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LibraryUnavailable, match="install a C compiler"):
        load_library(tmp_path)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libheadrace_baseline.so").write_bytes(b"\x7fELF")
    with pytest.raises(LibraryUnavailable, match=r"libheadrace_baseline\.so"):
        load_library(tmp_path)


def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    header = (SOURCES / "headrace.h").read_text()
    (tmp_path / "headrace.h").write_text(header.replace("int64_t rope;", "int64_t rope, added;"))
    source.write_text((SOURCES / "headrace.c").read_text())
    target = tmp_path / "libheadrace_baseline.so"
    for path in SOURCES.glob("*.[ch]"):
        if path.name not in ("headrace.h", "headrace.c"):
            shutil.copy(path, tmp_path)
    flags = ("-std=gnu11", "-O0", "-shared", "-fPIC", "-fvisibility=hidden")
    compiled = _run(_compiler(), *flags, source, "-o", target, "-lm", "-lpthread")
    assert compiled.returncode == 0, compiled.stderr
    with pytest.raises(LibraryUnavailable, match="belongs to another version"):
        load_library(tmp_path, frozenset())


def test_processor_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: x\n")
    assert processor_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd atomics asimddp\n")
    assert processor_flags(cpuinfo) == {"fp", "asimd", "atomics", "asimddp"}
    assert processor_flags(tmp_path / "absent") == frozenset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny-qwen3", out, vocab_size=512)
    return out


def test_the_kernels_serve_in_the_checkpoints_dtype(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = best_build()
    with caplog.at_level(logging.INFO):
        model = cpu.load_cpu_model(folder, load_model_config(folder), "auto")
    assert isinstance(model, FusedDecoder)
    assert model.kv_spec.dtype == torch.bfloat16
    assert [record.message for record in caplog.records] == [
        f"CPU backend: compiled kernels ({best.name})"
    ]


def test_without_kernels_torch_serves_in_float32_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(**_: object) -> None:
        raise LibraryUnavailable("no kernels here")

    monkeypatch.setattr(cpu, "load_library", unavailable)
    with caplog.at_level(logging.INFO):
        model = cpu.load_cpu_model(folder, load_model_config(folder), "auto")
    assert isinstance(model, Decoder)
    assert model.kv_spec.dtype == torch.float32
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no kernels here" in caplog.text


def test_the_user_says_which_kernels_serve(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    best_build()
    config = load_model_config(folder)
    with caplog.at_level(logging.INFO):
        model = cpu.load_cpu_model(folder, config, "auto", kernels="baseline")
        assert isinstance(model, FusedDecoder)
        plain = cpu.load_cpu_model(folder, config, "auto", kernels="torch")
        assert isinstance(plain, Decoder)
    assert [record.message for record in caplog.records] == [
        "CPU backend: compiled kernels (baseline)",
        "CPU backend: torch, as --cpu-kernels says",
    ]


def test_a_server_with_impossible_kernels_says_so_and_ends(folder: Path) -> None:
    flags = ("--port", "0", "--cpu-kernels", "neon_dotprod")
    if "asimddp" in processor_flags():
        pytest.skip("this processor can run what the test has refused")
    ran = _run(sys.executable, "-m", "stages.cli", "serve", folder, *flags)
    assert ran.returncode != 0
    assert "--cpu-kernels neon_dotprod: this processor lacks asimddp" in ran.stderr
