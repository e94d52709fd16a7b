"""systemd's end of the socket that NOTIFY_SOCKET names."""

from __future__ import annotations

import socket
import threading


class Manager:
    """systemd's end: keeps what it is told, with the process that said it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self.told: list[tuple[int, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            text, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
            self.told.append((int.from_bytes(ancillary[0][2][:4], "little"), text.decode()))

    @property
    def messages(self) -> list[str]:
        return [text for _, text in self.told]

    def states(self) -> list[str]:
        """Return what was said of the state, in order, without status and heartbeats."""
        return [text.split("\n")[0] for text in self.messages if not text.startswith(("STATUS=", "WATCHDOG="))]

    def count(self, message: str) -> int:
        return self.messages.count(message)
