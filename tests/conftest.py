"""What all tests share: options, markers, Hypothesis profiles, golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"

# Small tensors only: more threads cost more than they bring, and on a busy machine very much more.
torch.set_num_threads(1)

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a GPU machine as it stands; tests there that draw examples skip
    pass
else:
    # No deadline: the first call of a kernel compiles it. In CI every run draws the same examples.
    settings.register_profile(
        "default",
        deadline=None,
        max_examples=25,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile(
        "full",
        settings.get_profile("default"),
        max_examples=250,
        derandomize=False,
        print_blob=True,
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files that differ")
    parser.addoption(
        "--gpu-self-test",
        action="store_true",
        help="run tests/gpu on the CPU, to test the tests",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    not_full = pytest.mark.skip(reason="slow: runs with --full")
    may_run = torch.cuda.is_available() or config.getoption("--gpu-self-test")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not may_run:
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not config.getoption("--full"):
            item.add_marker(not_full)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given: tests of a large matrix sample it otherwise."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: text equals the file golden/NAME beside the test; --update-golden writes it."""
    folder = request.path.parent / "golden"

    def check(name: str, text: str) -> None:
        path = folder / name
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if old != text and request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert old is not None, f"{path} is missing: run pytest with --update-golden and read what it wrote"
        assert text == old, f"{path} differs: if that is meant, run pytest with --update-golden"

    return check
