"""The run directory of a group: 0700, ours, one live group in it, removed at the end."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from stages.errors import ConfigError
from stages.topology import status_path

# A Unix socket's path is at most 107 bytes; the longest name that we put behind it is ~30.
MAX_PATH_BYTES = 72


def default_run_dir(port: int) -> Path:
    """Where the group that serves `port` keeps its sockets: `headrace status` looks there too.

    Port 0 asks the kernel for one, which is not known yet: such a group is named by its process.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"headrace-{os.getuid()}-{port or f'pid{os.getpid()}'}"


def create_run_dir(path: Path) -> None:
    """Make `path` for this user alone; raises `ConfigError` where that cannot be."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"--run-dir {path} is too long for Unix sockets: take a shorter one")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(path)
    if _is_served(path):
        raise ConfigError(f"a group is running in {path} already: stop it or take another --port")
    for leftover in path.iterdir():  # of a group that was killed
        leftover.unlink()


def remove_run_dir(path: Path) -> None:
    """Remove the folder and what is in it."""
    shutil.rmtree(path, ignore_errors=True)


def _check_owner(folder: Path) -> None:
    status = folder.lstat()
    is_ours = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode)
    if not is_ours:
        raise ConfigError(f"{folder} belongs to somebody else: pass another --run-dir")
    folder.chmod(0o700)


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(status_path(str(path))))
        except OSError:
            return False
        return True
