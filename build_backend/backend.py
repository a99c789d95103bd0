"""setuptools' PEP 517 backend, building against the torch of the environment that is installed into.

An isolated build sees none of that environment's packages. Where torch is among them, their folders are added
to the end of `sys.path` (so that the isolated build's own packages win); where it is not, torch becomes a
build requirement, and the wheel then requires the same minor release.
"""

import json
import os
import re
import site
import subprocess
import sys
import sysconfig
from importlib import metadata

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

MINIMUM_TORCH = (2, 11)


def has_torch(paths: list[str]) -> bool:
    """Whether one of the folders holds a torch that is new enough."""
    found = next(iter(metadata.distributions(name="torch", path=paths)), None)
    release = re.match(r"(\d+)\.(\d+)", found.version) if found else None
    return release is not None and (int(release[1]), int(release[2])) >= MINIMUM_TORCH


def environment_folders() -> list[str]:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


if not has_torch(sys.path):
    folders = environment_folders()
    if has_torch(folders):
        sys.path.extend(folders)


def torch_about_to_come() -> str:
    """The release that pip would choose here: constraints can hold it back, which builds do not know."""
    wanted = "torch>={}.{}".format(*MINIMUM_TORCH)
    ask = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--quiet",
        "--report",
        "-",
        wanted,
    ]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(ask, env=outside, capture_output=True, text=True)
    if answer.returncode != 0:  # installers other than pip
        return wanted
    return "torch=={}".format(json.loads(answer.stdout)["install"][0]["metadata"]["version"])


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    return [] if has_torch(sys.path) else [torch_about_to_come()]


get_requires_for_build_editable = get_requires_for_build_wheel
