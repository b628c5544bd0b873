"""What tests/conftest.py makes of a run: a worker that dies fails it, a part of the extra tests is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

ROOT = Path(__file__).resolve().parents[2]
# Where it dies; the worker's own test is over by the third.
DEATHS = {
    "abort": ("os.abort()", r"FAILED .*::test_dies"),
    "silent exit": ("os._exit(0)", r"FAILED .*::test_dies"),
    "status at exit": ("atexit.register(os._exit, 3)", r"LOST worker gw0: .*status 3.*::test_dies"),
    "at exit": ("atexit.register(os.abort)", r"LOST worker gw0: .*SIGABRT.*::test_dies"),
}
TESTS = """
import atexit, os

def test_before(): pass
def test_dies(): {death}
"""


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_a_lost_worker_fails_the_run(death: str, tmp_path: Path) -> None:
    code, said = DEATHS[death]
    found = run(tmp_path, TESTS.format(death=code))
    assert found.returncode == 1, found.stdout
    assert re.search(said, found.stdout), found.stdout


@pytest.mark.slow
def test_a_run_without_a_death_passes(tmp_path: Path) -> None:
    found = run(tmp_path, TESTS.format(death="pass"))
    assert found.returncode == 0, found.stdout
    assert "2 passed" in found.stdout and "LOST" not in found.stdout


CACHE = """
import os, pathlib

def test_cache():
    folder = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir() and not list(folder.iterdir())
    pathlib.Path("folder").write_text(str(folder))
"""


@pytest.mark.slow
def test_inductors_cache_is_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    found = run(tmp_path, CACHE)
    assert found.returncode == 0, found.stdout
    assert not Path((tmp_path / "folder").read_text()).exists()


EXTRA = """
import pytest

@pytest.mark.extra
@pytest.mark.parametrize("i", range(30))
def test_extra(i): pass

def test_always(): pass
"""


@pytest.mark.slow
def test_every_extra_test_is_in_one_part(tmp_path: Path) -> None:
    parts = []
    for part in range(5):
        workers = str(int(part == 0))
        found = run(tmp_path / str(part), EXTRA, "-v", "-n", workers, EXTRA_PART=str(part))
        assert found.returncode == 0, found.stdout
        assert f"EXTRA_PART={part} repeats it" in found.stdout
        assert "::test_always" in found.stdout
        parts.append(set(re.findall(r"::test_extra\[(\d+)\]", found.stdout)))
    assert all(parts)
    assert sorted(int(i) for found in parts for i in found) == list(range(30))
    assert "30 passed" in run(tmp_path / "all", EXTRA, "-m", "extra", "-n", "0").stdout


def run(
    folder: Path, tests: str, *options: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """With the conftest of these tests, in a folder of its own."""
    (folder / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "advdl_ops").symlink_to(ROOT / "advdl_ops")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "test_deaths.py").write_text(tests)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "--dist",
        "worksteal",
        "-p",
        "no:cacheprovider",
        *options,
        "tests",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
