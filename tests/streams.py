"""Live sources for tests: what another program pipes in, or a server sends."""

import contextlib
import os
import socket
import struct
import threading


@contextlib.contextmanager
def piped(data=None):
    """Sends bytes through this process's stdin; without any, yields where to write them."""
    ours, theirs = os.pipe()
    kept = os.dup(0)
    os.dup2(ours, 0)
    os.close(ours)
    pipe = open(theirs, "wb", buffering=0)
    try:
        if data is None:
            yield pipe
        else:
            threading.Thread(target=_send_all, args=(pipe, data), daemon=True).start()
            yield None
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        if data is None:
            pipe.close()


def _send_all(pipe, data):
    with contextlib.suppress(BrokenPipeError), pipe:
        while data:
            data = data[pipe.write(data) :]


@contextlib.contextmanager
def served(data, scheme="tcp", broken=None):
    """The URL of a server that sends bytes to the first who asks.

    It ends well, or breaks off when the event `broken` is set.
    """
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    if scheme == "http":
                        connection.recv(10_000)
                        connection.sendall(head)
                    connection.sendall(data)
                    if broken is not None:
                        broken.wait(10)
                        connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{scheme}://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)
