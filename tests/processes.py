"""Processes that tests start, and end."""

import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def kill_once_saved(command: list[str], checkpoint: Path, seconds: float) -> None:
    """Runs `command` until `checkpoint` is there, for which it has so many seconds, and kills it."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + seconds
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    _, printed = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed
