"""Who may import whom: the house rules of docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "shm",
    "stages",
    "gateway_svc",
    "tokenizer_svc",
    "scheduler_svc",
    "executor_svc",
    "sampler_svc",
)
SERVICES = {name for name in PACKAGES if name.endswith("_svc")}
# In the device placement the sampling kernel runs next to the logits.
ALLOWED_BETWEEN_SERVICES = {("executor_svc", "sampler_svc.sampling")}
ONLY_IN = {
    "torch": {"executor_svc", "sampler_svc"},
    "aiohttp": {"gateway_svc"},
    "transformers": {"tokenizer_svc", "executor_svc"},
    "tokenizers": {"tokenizer_svc", "sampler_svc", "executor_svc"},
    "prometheus_client": {"gateway_svc"},
}
# The executor knows text only where models are made and where transformers runs one for us.
EXECUTOR_FILES_WITH_TEXT = {
    "executor_svc/embedded/train.py",
    "executor_svc/make_model.py",
    "executor_svc/make_tokenizer.py",
    "executor_svc/perplexity.py",
    "executor_svc/models/transformers_adapter.py",
    "executor_svc/models/adapter_attention.py",
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}
THIRD_PARTY_OF_STAGES = {"msgspec", "zmq", "numpy", "uvloop"}


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


ALL_IMPORTS = [
    (package, path, name)
    for package in PACKAGES
    for path in source_files(package)
    for name in imports(path)
]


def offences(is_wrong: object) -> list[str]:
    assert callable(is_wrong)
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for package, path, name in ALL_IMPORTS
        if is_wrong(package, path, name)
    ]


def top(name: str) -> str:
    return name.split(".")[0]


def is_standard(name: str) -> bool:
    return top(name) in sys.stdlib_module_names


def test_every_package_has_files() -> None:
    assert {package for package, _, _ in ALL_IMPORTS} == set(PACKAGES)


def test_shm_imports_the_standard_library_only() -> None:
    assert offences(lambda p, _, n: p == "shm" and top(n) != "shm" and not is_standard(n)) == []


def test_stages_imports_no_service_and_little_else() -> None:
    allowed = {"stages", "shm"} | THIRD_PARTY_OF_STAGES
    wrong = offences(lambda p, _, n: p == "stages" and top(n) not in allowed and not is_standard(n))
    assert wrong == []


def test_services_do_not_import_each_other() -> None:
    def is_wrong(package: str, _: Path, name: str) -> bool:
        is_other = top(name) in SERVICES and top(name) != package
        return package in SERVICES and is_other and (package, name) not in ALLOWED_BETWEEN_SERVICES

    assert offences(is_wrong) == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_belong(library: str) -> None:
    wrong = offences(lambda p, _, n: top(n) == library and p not in ONLY_IN[library])
    assert wrong == []


def test_the_executor_knows_text_in_few_files() -> None:
    def is_wrong(package: str, path: Path, name: str) -> bool:
        file = path.relative_to(ROOT).as_posix()
        is_text = top(name) in {"transformers", "tokenizers"}
        return package == "executor_svc" and is_text and file not in EXECUTOR_FILES_WITH_TEXT

    assert offences(is_wrong) == []


def test_nothing_imports_a_pickle() -> None:
    assert offences(lambda _, __, n: top(n) in FORBIDDEN) == []


def test_no_package_is_called_kernels_or_models() -> None:
    """Transformers looks for a package named `kernels` and would take ours."""
    names = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert names == {*PACKAGES, "benchmarks", "tests"}
