"""Where several processes meet: at the coordinator's address, before jax is told of it.

What does not fit in jax's own rendezvous ends a process without a word that a user could use, so
the processes make sure first that all of them are there, and that each is somebody else. A process
sends one line of JSON, which says who it is, and gets one back, which is what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import NamedTuple

from fedlp_jax.errors import FedLPError

_RETRY_SECONDS = 0.1
_LINE = 4096  # bytes a line may have


class Address(NamedTuple):
    """Where process 0 is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`"10.0.0.1:1234"` -> host and port.

    Raises:
      FedLPError: it is none.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise FedLPError(
            f"coordinator={text!r} must be HOST:PORT, the address of process 0 and a free port "
            "there, as in 10.0.0.1:1234."
        )
    return Address(host, int(port))


def check_place(num_processes: int | None, process_id: int | None) -> tuple[int, int]:
    """How many there are and which one this is, both checked.

    Raises:
      FedLPError: one is missing, or out of range.
    """
    missing = [
        name
        for name, value in (("num_processes", num_processes), ("process_id", process_id))
        if value is None
    ]
    if missing or num_processes is None or process_id is None:
        raise FedLPError(
            f"a coordinator is given but no {' and no '.join(missing)}: say how many processes "
            "there are, and which of them this is, counting from 0."
        )
    if num_processes < 1:
        raise FedLPError(f"num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise FedLPError(
            f"process_id={process_id} is out of range for num_processes={num_processes}: they "
            f"count from 0 to {num_processes - 1}."
        )
    return num_processes, process_id


def meet(address: Address, num_processes: int, process_id: int, seconds: float) -> None:
    """Waits until all processes are there.

    Raises:
      FedLPError: not all came in time, two have the same id, they were told of different numbers,
        or the port is taken.
    """
    deadline = time.monotonic() + seconds
    if process_id == 0:
        wrong = _receive_all(address, num_processes, seconds, deadline)
    else:
        wrong = _call(address, num_processes, process_id, seconds, deadline)
    if wrong:
        raise FedLPError(wrong)


def _receive_all(address: Address, num_processes: int, seconds: float, deadline: float) -> str:
    """Process 0: takes a line from each of the others, then tells all what is wrong, if it is."""
    try:
        server = _listen(address.port)
    except OSError as error:
        raise FedLPError(
            f"process 0 cannot listen on port {address.port} ({error.strerror}); choose another "
            "port for all processes."
        ) from error
    wrong = ""
    there: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as stack:
        while not wrong and len(there) < num_processes - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                late = sorted(set(range(1, num_processes)) - set(there))
                wrong = (
                    f"only {len(there) + 1} of {num_processes} processes came to {address} within "
                    f"{seconds:g} s: not process {', '.join(map(str, late[:10]))}."
                )
                break
            said = _read_line(caller, deadline)
            if said is None:  # somebody else, such as a scan of ports
                continue
            who, of = said.get("process_id"), said.get("num_processes")
            if not isinstance(who, int):
                continue
            if of != num_processes:
                wrong = (
                    f"process {who} was told of {of} processes, and process 0 of {num_processes}; "
                    "give all of them the same number."
                )
            elif who in there or who == 0:
                wrong = f"two processes have process_id={who}; each needs its own."
            there[-1 if wrong else who] = caller
        for caller in there.values():
            with contextlib.suppress(OSError):  # it has gone, and jax will miss it
                caller.sendall((json.dumps({"wrong": wrong}) + "\n").encode())
                caller.settimeout(1.0)
                caller.recv(1)  # who hangs up first keeps the port busy for a while
    return wrong


def _call(
    address: Address, num_processes: int, process_id: int, seconds: float, deadline: float
) -> str:
    """The others: finds process 0, says who this is and returns what is wrong."""
    line = json.dumps({"process_id": process_id, "num_processes": num_processes}) + "\n"
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection(address, timeout=max(left, 0.001)) as connection:
                connection.sendall(line.encode())
                # Process 0 gives up first, and then says who is missing.
                said = _read_line(connection, deadline + 5.0)
            if said is not None:
                return str(said.get("wrong", ""))
            why = "it hung up"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() + _RETRY_SECONDS >= deadline:
            return (
                f"process {process_id} could not reach process 0 at {address} within {seconds:g} s "
                f"({why}); start process 0 there, and see that a firewall lets port {address.port} "
                "pass."
            )
        time.sleep(_RETRY_SECONDS)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _read_line(connection: socket.socket, deadline: float) -> dict[str, object] | None:
    """One line of JSON, which is an object; None for anything else."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < _LINE:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            part = connection.recv(_LINE)
            if not part:
                return None
            received += part
        said = json.loads(received)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
