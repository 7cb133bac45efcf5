"""Where the daemon listens when nobody says so: one answer for the daemon and its clients.

`$MSD_ENDPOINT`, else `/run/msd/msd.sock` (the service), else `msd/msd.sock` below `$XDG_RUNTIME_DIR` (a user's own).
There is no fallback below a folder that everybody may write: a stranger could wait there for other people's prompts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "MSD_ENDPOINT"
SERVICE_SOCKET = "/run/msd/msd.sock"
IPC = "ipc://"


def socket_paths(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Paths of the default socket, the service's first."""
    runtime_dir = environ.get("XDG_RUNTIME_DIR", "")
    return (SERVICE_SOCKET, f"{runtime_dir}/msd/msd.sock") if runtime_dir else (SERVICE_SOCKET,)


def for_client(endpoint: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Endpoint to connect to: the given one, else the first default socket that exists, else the service's."""
    if endpoint and endpoint != IPC:
        return endpoint
    if named := environ.get(VARIABLE):
        return named
    paths = socket_paths(environ)
    return IPC + next((path for path in paths if os.path.exists(path)), paths[0])


def for_daemon(endpoint: str = IPC, environ: Mapping[str, str] = os.environ) -> str | None:
    """Endpoint to bind: the given one, else the first default socket whose folder may be written or made.

    None when there is no such place.
    """
    if endpoint != IPC:
        return endpoint
    if named := environ.get(VARIABLE):
        return named
    for path in socket_paths(environ):
        folder = os.path.dirname(path)
        if os.access(folder if os.path.isdir(folder) else os.path.dirname(folder), os.W_OK | os.X_OK):
            return IPC + path
    return None
