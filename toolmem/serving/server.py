"""Running the application: a socket that is known to be ours, and an end that is clean."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from starlette.applications import Starlette


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: a name or address of this machine.
        port: 0 for any that is free.

    Raises:
        ToolmemError: the port is taken, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise ToolmemError(f"--port {port}: it must be from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ToolmemError(
            f"cannot listen at {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from error


def run_server(
    app: Starlette, sock: socket.socket, *, grace_s: int = 10, access_log: bool = False
) -> None:
    """Serve until Ctrl-C or SIGTERM: then no new connections, and time for those that are open.

    Args:
        app: what ``build_app`` made.
        sock: what ``listen`` made.
        grace_s: seconds that answers under way get to end.
        access_log: a line on stderr for each request.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        lifespan="on",
        timeout_graceful_shutdown=grace_s,
        server_header=False,
        ws="none",
    )
    # uvicorn raises the signal that ended it once more, when all is closed
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvicorn.Server(config).run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        sock.close()
