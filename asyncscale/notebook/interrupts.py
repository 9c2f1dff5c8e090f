"""The stop button of a notebook, while nothing else happens."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading

from asyncscale.notebook.cells import current_run


def wake_at_signals() -> None:
    """Have a signal wake the event loop that runs here. In a kernel's cells only; once; to be called from a cell.

    At an interrupt, ipykernel's handler schedules the cancellation of the cell, and does not wake the loop: while a
    cell waits for what takes long, such as the start of engines, the button would do nothing until that has come.
    """
    if current_run() is None or threading.current_thread() is not threading.main_thread():
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    others = signal.set_wakeup_fd(-1)
    if others != -1:  # somebody sees to it already
        signal.set_wakeup_fd(others)
        return
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    loop.add_reader(reader, _drain, reader, writer)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)


def _drain(reader: socket.socket, writer: socket.socket) -> None:
    """writer: lives as long as the loop looks at the other end."""
    reader.recv(4096)
