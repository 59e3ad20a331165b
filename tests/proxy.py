"""A TCP proxy before a server: it can swallow everything, lose one answer, and turn to another server."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator


class Proxy:
    """Passes connections to 127.0.0.1:`target` on, each with two threads of its own; with `tls`, as plain text."""

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = target  # a port; connections that are open stay where they are
        self._tls = tls
        self.swallows = False
        self.swallowed = self.lost = 0  # pieces that were swallowed; answers that were lost
        self._lose_answer_to: tuple[bytes, ...] = ()
        self._before: tuple[bytes, Callable[[], object]] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_answer_to(self, *words: str) -> None:
        """The next call with these words reaches the server; its answer does not come back: the connection breaks."""
        self._lose_answer_to = tuple(word.encode() for word in words)

    def before(self, word: str, action: Callable[[], object]) -> None:
        """The action is done when the next call with the word has come, before it is passed on."""
        self._before = word.encode(), action

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:  # among them one who does not trust the certificate
            client.close()
            return
        server.settimeout(None)
        self._open |= {client, server}
        losing = threading.Event()
        threading.Thread(target=self._pass, args=(client, server, losing, True), daemon=True).start()
        self._pass(server, client, losing, False)

    def _pass(self, source: socket.socket, to: socket.socket, losing: threading.Event, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                if self.swallows:
                    self.swallowed += 1
                    continue
                if asks and self._before and self._before[0] in piece:
                    (_, action), self._before = self._before, None
                    action()
                if asks and self._lose_answer_to and all(word in piece for word in self._lose_answer_to):
                    self._lose_answer_to = ()
                    losing.set()
                if losing.is_set() and not asks:
                    self.lost += 1
                    break
                to.sendall(piece)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)

    def break_all(self) -> None:
        """Every connection that is open."""
        self._shut(*self._open)

    def close(self) -> None:
        self._shut(self._listener, *self._open)

    @staticmethod
    def _shut(*ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextlib.contextmanager
def proxy(target: int, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    opened = Proxy(target, tls)
    try:
        yield opened
    finally:
        opened.close()
