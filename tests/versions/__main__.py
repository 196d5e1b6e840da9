"""Run the README's snippet, the demo and the default suite in environments of other versions.

``make test-versions VERSIONS=torch-2.15`` is ``python -m tests.versions torch-2.15``. Each environment is
made under ``.peers/`` and removed when its tests have run. The results go into ``results.json`` and into the
table in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.versions.environments import NAMES, NEWEST, Environment, environment, obstacle
from tests.versions.results import LIBRARIES, Result, Suite, load, store, write_page

_UV = Path(sys.executable).with_name("uv")
_VERSIONS = """
import importlib.metadata, json, platform, sys
known = {d.name.lower() for d in importlib.metadata.distributions()}
versions = {name: importlib.metadata.version(name) for name in sys.argv[1:] if name in known}
print(json.dumps([platform.python_version(), versions]))
"""


def main() -> None:
    """Test the environments of the command line, and exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"environments: {', '.join(NAMES)}; all by default"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments in .peers/")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    parser.add_argument(
        "--list", action="store_true", help="print the names, the newest torch first"
    )
    options = parser.parse_args()
    needed = {name: obstacle(name) for name in NAMES}
    here = [name for name in NAMES if not needed[name]]
    if options.list:
        print(NEWEST, *(name for name in here if name != NEWEST))
        return
    for name in () if options.names else NAMES:
        if needed[name]:
            print(f"== {name}: left out, it needs {needed[name]}")
    environments = [environment(name) for name in options.names or here]
    if not _UV.exists():
        raise SystemExit("uv is missing: make test-versions installs it")
    # What is terminated, as by a time limit, removes its environment.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = [env.name for env in environments if not _tested(env, options.jobs, options.keep)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _tested(wanted: Environment, jobs: int, keep: bool) -> bool:
    """Test one environment and record the result; True if everything has passed."""
    folder = ROOT / ".peers" / f"versions-{wanted.name}"
    try:
        _say(wanted, "install")
        _install(wanted, folder, keep)
        result = _run(wanted, folder, jobs)
        # Before the environment is removed, which takes long enough to be interrupted.
        store({**load(), wanted.name: result})
        write_page(load())
        _say(wanted, "passed" if result.passed else "FAILED")
    except (subprocess.CalledProcessError, ValueError) as error:
        _say(wanted, f"FAILED: {error}")
        return False
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return result.passed


def _install(wanted: Environment, folder: Path, keep: bool) -> None:
    """Make the environment, with uv, which does not read the configuration of pip."""
    uv = [str(_UV), *(() if keep else ("--no-cache",))]
    python = shutil.which(wanted.python)
    subprocess.run([*uv, "venv", "--quiet", "--clear", f"--python={python}", folder], check=True)
    install = [*uv, "pip", "install", "--quiet", f"--python={folder}/bin/python"]
    subprocess.run([*install, *wanted.requirements, "--editable", f"{ROOT}[test]"], check=True)


def _run(wanted: Environment, folder: Path, jobs: int) -> Result:
    """Run the snippet, the demo and the suite."""
    commands = folder / "bin"
    python = commands / "python"
    asked = subprocess.run(
        [python, "-c", _VERSIONS, *LIBRARIES], check=True, capture_output=True, text=True
    )
    release, versions = json.loads(asked.stdout)
    kind, _, named = wanted.name.partition("-")
    if named and not f"{release if kind == 'python' else versions['torch']}.".startswith(
        f"{named}."
    ):
        raise ValueError(f"it has Python {release} and PyTorch {versions['torch']}")
    _say(wanted, f"Python {release}, {', '.join(map(' '.join, versions.items()))}")
    with tempfile.TemporaryDirectory() as scratch:
        snippet = Path(scratch, "snippet.py")
        code = next(
            b for b in blocks((ROOT / "README.md").read_text("utf-8")) if b.language == "python"
        )
        snippet.write_text(code.text, encoding="utf-8")
        _say(wanted, "the README's snippet")
        snippet_ran = _ends_well([python, snippet], scratch)
        _say(wanted, "the demo")
        demo_ran = _ends_well([commands / "lora-fx", "demo", "--out=demo"], scratch)
        _say(wanted, "the default suite")
        report = Path(scratch, "report.xml")
        tests = [python, "-m", "pytest", f"-n{jobs}", "--dist=worksteal", "-q"]
        ended = _ends_well([*tests, "--durations=10", f"--junitxml={report}"], str(ROOT))
        suite = Suite.of_report(report)
        if suite is not None and not ended and not suite.failed:
            suite = None  # interrupted
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return Result(today, release, versions, snippet_ran, demo_ran, suite)


def _ends_well(command: list[str | Path], folder: str) -> bool:
    # The names of programs are looked up here, too: ninja and compilers of torch.
    path = os.pathsep.join((str(Path(command[0]).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, "LORA_FX_RECORDS": "1"}
    done = subprocess.run(command, check=False, cwd=folder, env=environment)
    return done.returncode == 0


def _say(wanted: Environment, what: str) -> None:
    print(f"== {wanted.name}: {what}", flush=True)


if __name__ == "__main__":
    main()
