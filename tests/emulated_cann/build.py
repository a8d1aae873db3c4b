"""Builds the emulator's libraries, once for each state of its sources and of the torch_npu wheel.

Usage: python -m tests.emulated_cann.build   (prints the folder of the libraries)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from tests.emulated_cann.stubs import stub_source

_HERE = Path(__file__).parent
_CACHE = _HERE / ".build"
_NUM_KEPT = 3
_OPTIONS = ("-fPIC", "-O1", "-Wall", "-Wextra")
# torch_npu links to all of these. Only the runtime and the operators hold code.
_EMPTY_LIBRARIES = ("hccl", "ge_runner", "graph", "acl_tdt_channel", "acl_op_compiler")


def unavailable() -> str | None:
    """Say why the emulator cannot be built here; None where it can."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"the emulated NPU needs {tool}"
    if _package("torch_npu") is None:
        return "the emulated NPU needs the torch_npu wheel (pip install torch-npu==2.13.0)"
    return None


def build() -> Path:
    """Return the folder of the libraries, built now if need be. Safe to call in parallel."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    folder = _CACHE / f"lib-{_state()}"
    if folder.exists():
        return folder
    with _lock():
        if not folder.exists():
            _build_into(folder)
            _forget_old()
    return folder


def _build_into(folder: Path) -> None:
    work = _CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    runtime, operators = _compile(work)
    stubs = work / "stubs.c"
    stubs.write_text(stub_source(_wheel(), runtime))
    runtime.append(_run_compiler("-x", "c", "-w", "-fPIC", "-c", str(stubs), out=work / "stubs.o"))
    _link(work, "ascendcl", runtime, "-lpthread")
    for name in _EMPTY_LIBRARIES:
        _link(work, name, [], "-Wl,--no-as-needed", f"-L{work}", "-lascendcl")
    torch_libraries = (f"-L{_torch() / 'lib'}", "-ltorch_cpu", "-lc10", f"-L{work}", "-lascendcl")
    _link(work, "opapi", operators, "-Wl,--allow-shlib-undefined", *torch_libraries)
    also_torch = ("-Wl,--no-as-needed,--allow-shlib-undefined", f"-L{work}", "-lopapi")
    _link(work, "nnopbase", [], *also_torch)
    finished = _CACHE / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    for library in work.glob("*.so"):
        library.rename(finished / library.name)
    shutil.rmtree(work)
    finished.rename(folder)


def _compile(work: Path) -> tuple[list[Path], list[Path]]:
    """Objects of the runtime and of the operators."""
    headers = _wheel() / "include"
    acl = ("-isystem", str(headers), "-isystem", str(headers / "acl"))
    runtime_flags = ("-std=c++17", *_OPTIONS, *acl)
    aten = ("-isystem", str(_torch() / "include"))
    operator_flags = ("-std=c++20", *_OPTIONS, *acl, *aten)
    precompiled = work / "precompiled.h"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        header = pool.submit(
            _run_compiler,
            *operator_flags,
            *("-x", "c++-header", str(_HERE / "operators" / precompiled.name)),
            out=precompiled.with_suffix(".h.gch"),
        )

        def compile_one(source: Path, flags: tuple[str, ...]) -> Path:
            object_file = work / f"{source.parent.name}-{source.stem}.o"
            return _run_compiler(*flags, "-c", str(source), out=object_file)

        runtime = [
            pool.submit(compile_one, source, runtime_flags) for source in _sources("runtime")
        ]
        header.result()
        with_header = (*operator_flags, "-I", str(work), "-include", precompiled.name)
        operators = [
            pool.submit(compile_one, source, with_header) for source in _sources("operators")
        ]
        return [job.result() for job in runtime], [job.result() for job in operators]


def _link(work: Path, name: str, objects: list[Path], *libraries: str) -> None:
    soname = f"lib{name}.so"
    arguments = ("-shared", f"-Wl,-soname,{soname}", *map(str, objects), *libraries)
    _run_compiler(*arguments, out=work / soname)


def _run_compiler(*arguments: str, out: Path) -> Path:
    command = ["g++", *arguments, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return out


def _sources(part: str) -> list[Path]:
    return sorted((_HERE / part).glob("*.cpp"))


def _state() -> str:
    """A digest of everything that the libraries depend on."""
    digest = hashlib.sha256()
    for package in ("torch", "torch_npu"):
        digest.update(
            f"{package} {importlib.metadata.version(package)} {_package(package)}\n".encode()
        )
    inputs = [path for part in ("runtime", "operators") for path in (_HERE / part).iterdir()]
    for path in sorted([*inputs, *_HERE.glob("*.py")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _lock() -> Iterator[None]:
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_old() -> None:
    folders = sorted(_CACHE.glob("lib-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-_NUM_KEPT]:
        shutil.rmtree(folder)


def _package(name: str) -> Path | None:
    """The folder of a package, found without importing it."""
    spec = PathFinder.find_spec(name)  # whatever this process hides from itself
    if spec is None or spec.submodule_search_locations is None:
        return None
    return Path(spec.submodule_search_locations[0])


def _wheel() -> Path:
    folder = _package("torch_npu")
    assert folder is not None
    return folder


def _torch() -> Path:
    folder = _package("torch")
    assert folder is not None
    return folder


if __name__ == "__main__":
    print(build())
