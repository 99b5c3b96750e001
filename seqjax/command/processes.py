"""Training by several processes: they find each other, compare what they were told, and end together.

Each of the processes that the user starts watches a worker, a process of its own that trains. The watching process 0
listens at the address of the coordinator, and the others connect to it. Over these connections they compare their
settings before anything is trained. The connections stay open, so the end of a process, however it came, is known to
the others at once, and none of their workers waits for a sum over the devices that cannot come any more.
`jax.distributed` connects the workers. It ends a worker by a crash when another one is gone, so the watching process
says the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from seqjax.command.run_folder import RunError
from seqjax.training._devices import Devices

COORDINATOR = "SEQJAX_COORDINATOR"  # the variable of the environment from which a worker knows what it is
Message = dict[str, Any]


class OptionError(ValueError):
    """The options of a command contradict each other, or this machine."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a training runs. It does not determine the result, except for the last digits."""

    devices: int = 1
    """Devices of each process that share the rows of a batch."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes train together; they share the folder of the run."""
    processes: int = 1
    """How many processes train together."""
    process: int = 0
    """Which of them this is, from 0."""
    wait: int = 60
    """Seconds to wait for the other processes at the start."""

    def __post_init__(self) -> None:
        for name in ("devices", "processes", "wait"):
            if getattr(self, name) < 1:
                raise OptionError(f"expected --{name} of at least 1, got {getattr(self, name)}")
        if not 0 <= self.process < self.processes:
            fix = "give each process its own number" if self.processes > 1 else "give --processes too"
            raise OptionError(f"expected --process from 0 to {self.processes - 1}, got {self.process}: {fix}")
        if (self.processes > 1) != (self.coordinator is not None):
            given, missing = ("processes", "coordinator") if self.processes > 1 else ("coordinator", "processes")
            raise OptionError(
                f"expected --{missing} with --{given}, got none: --coordinator HOST:PORT --processes N --process I"
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise OptionError(f"expected --coordinator HOST:PORT, got {self.coordinator}: --coordinator node0:7000")

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of the coordinator."""
        host, _, port = (self.coordinator or "").rpartition(":")
        return host, int(port)

    def check_batch(self, rows: int, accumulate: int) -> None:
        """Raises OptionError if the devices of all processes do not divide the rows of a part of a batch evenly."""
        count = self.devices * self.processes * accumulate
        if rows % count and self.devices * self.processes > 1:
            parts = f"{self.devices * self.processes} devices" + f" and --accumulate {accumulate}" * (accumulate > 1)
            raise OptionError(
                f"expected a batch that {parts} divide evenly, got {rows} rows: "
                f"--batch {max(rows // count, 1) * count}, or other --devices"
            )

    def mesh_devices(self) -> Devices:
        """The devices of all processes that train; None for the default device.

        Raises:
            OptionError: this process has fewer devices.
        """
        have = jax.local_devices()
        if self.devices > len(have):
            fix = (
                "XLA_FLAGS=--xla_force_host_platform_device_count makes more" if have[0].platform == "cpu" else "use it"
            )
            raise OptionError(
                f"expected --devices of at most {len(have)}, the number of {have[0].platform} devices of this process, "
                f"got {self.devices}: {fix}"
            )
        if self.devices == self.processes == 1:
            return None
        of_process = [[d for d in jax.devices() if d.process_index == i] for i in range(self.processes)]
        return [device for devices in of_process for device in devices[: self.devices]]


def is_worker() -> bool:
    """Whether this process is the worker of another one that watches it."""
    return COORDINATOR in os.environ


def start_worker(places: Places) -> None:
    """Connects the devices of all workers. This one ends when the process that watches it is gone."""

    def end_with_the_watching_process() -> None:
        while os.read(0, 1):  # `sys.stdin` has a lock, which the end of the interpreter would need
            pass
        os._exit(1)

    threading.Thread(target=end_with_the_watching_process, daemon=True).start()
    jax.distributed.initialize(os.environ[COORDINATOR], places.processes, places.process)


def end_worker() -> None:
    """Waits until all workers are done."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def wait_for_all(name: str) -> None:
    """Waits until every worker has come to the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process prints what one of them must."""
    return jax.process_index() == 0


def in_any(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is True in any process."""
    if jax.process_count() == 1:
        return flags
    return tuple(map(bool, np.any(multihost_utils.process_allgather(np.array(flags)), axis=0)))


def watch(places: Places, arguments: Sequence[str], told: Callable[[], Message], advice: str) -> int:
    """Runs a worker until it ends, or until another process has ended before its training was over.

    Args:
        places: of this process.
        arguments: of the command that the worker runs.
        told: values by name, which must be equal in all processes.
        advice: what to do if another process has ended.

    Returns:
        The exit status of the worker, or 1 after one sentence on stderr that says what happened.

    Raises:
        RunError: a process is missing, or the processes do not agree.
    """
    links, coordinator = _met(places, told)
    events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for i, link in links.items():
        threading.Thread(target=lambda i=i, link=link: events.put((i, link.receive())), daemon=True).start()
    command = [sys.executable, "-m", "seqjax", *arguments]
    worker = subprocess.Popen(
        command,
        env=os.environ | {COORDINATOR: coordinator},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches it through this process only
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: worker.send_signal(number))
    own = places.process
    threading.Thread(target=lambda: events.put((own, _printed(worker))), daemon=True).start()
    status, reason = 1, None
    while reason is None:
        i, message = events.get()
        if i != own:
            reason = _reason(i, message, advice)
        elif worker.returncode in (0, 130):
            status, reason = worker.returncode, ""
        else:
            status, reason = max(worker.returncode, 1), _news(events, advice) or _complaint(own, worker, message)
    worker.kill()
    for link in links.values():
        link.send({"left": reason})
    if reason:
        print(f"seqjax: {reason}", file=sys.stderr, flush=True)
    return status


def _printed(worker: subprocess.Popen[str]) -> str:
    """What a worker wrote to stderr until its end. `communicate` would close its stdin, which is its sign of life."""
    printed = "" if worker.stderr is None else worker.stderr.read()
    worker.wait()
    return printed


def _reason(i: int, message: Message | None, advice: str) -> str | None:
    """Why this process ends after a message of another one; None if that one is done."""
    return _ended(i, advice) if message is None else message["left"] or None


def _news(events: queue.SimpleQueue[tuple[int, Any]], advice: str, seconds: float = 2.0) -> str | None:
    """What others tell shortly after the worker failed: its error is often that another one was gone before."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        while True:
            i, message = events.get(timeout=max(deadline - time.monotonic(), 0.01))
            if reason := _reason(i, message, advice):
                return reason
    return None


def _complaint(i: int, worker: subprocess.Popen[str], printed: str) -> str:
    """What the worker said of its end."""
    lines = [line.removeprefix("seqjax: ") for line in printed.splitlines() if line.startswith("seqjax: ")]
    return lines[-1] if lines else f"the worker of process {i} ended with status {worker.returncode}:\n{printed}"


def _met(places: Places, told: Callable[[], Message]) -> tuple[dict[int, _Link], str]:
    """The connections to the other processes, or to process 0, and the address of the coordinator of JAX."""
    host, _ = places.address
    links = _accepted(places) if places.process == 0 else {0: _connected(places)}
    error, values = None, {}
    try:
        values = told()
    except (RunError, ValueError) as found:
        error = found
    message = {"error": None if error is None else str(error), "values": values | {"--processes": places.processes}}
    if places.process:
        links[0].send(message)
        answer = links[0].receive() or {"refusal": _ended(0, "start all of them again")}
    else:
        messages: dict[int, Any] = {0: message} | {i: link.receive() for i, link in links.items()}
        # JAX listens at a port of its own.
        answer = {"refusal": _refusal(messages), "port": _free_port()}
        for link in links.values():
            link.send(answer)
    if error is not None:
        raise error
    if answer["refusal"]:
        raise RunError(answer["refusal"])
    return links, f"{host}:{answer['port']}"


class _Link:
    """A connection to another process, which carries one JSON object per line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.file = connection.makefile("rwb")

    def send(self, message: Message) -> None:
        """Sends a message, if the other process is still there."""
        with contextlib.suppress(OSError):
            self.file.write(json.dumps(message).encode() + b"\n")
            self.file.flush()

    def receive(self) -> Message | None:
        """The next message; None if the other process has ended."""
        try:
            line = self.file.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None


def _accepted(places: Places) -> dict[int, _Link]:
    """The connections of process 0 to all other processes."""
    links: dict[int, _Link] = {}
    deadline = time.monotonic() + places.wait
    _, port = places.address
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise RunError(
            f"expected a free port for --coordinator, got {port}: {error.strerror}; choose another one"
        ) from None
    with server:
        while len(links) < places.processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link = _Link(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, places.processes) if i not in links)
                _refuse(
                    [*links.values()],
                    f"expected {places.processes} processes within {places.wait} s, got no process {missing}: "
                    f"start it with the same --coordinator, or give all a longer --wait",
                )
            i = (link.receive() or {}).get("process")
            if not isinstance(i, int) or i in links or i not in range(1, places.processes):
                _refuse(
                    [*links.values(), link],
                    f"expected each --process from 0 to {places.processes - 1} once, got "
                    f"{i}{' twice' if i in links else ''}: give each process its own number, and the same --processes",
                )
            links[i] = link
    return links


def _refuse(links: list[_Link], reason: str) -> NoReturn:
    for link in links:
        link.receive()  # what the other process tells first
        link.send({"refusal": reason})
    raise RunError(reason)


def _connected(places: Places) -> _Link:
    """The connection to process 0."""
    deadline = time.monotonic() + places.wait
    while True:
        try:
            link = _Link(socket.create_connection(places.address, timeout=max(deadline - time.monotonic(), 0.1)))
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise RunError(
                f"expected process 0 at {places.coordinator} within {places.wait} s, got no answer "
                f"({error.strerror or error}): start it, check --coordinator, or give a longer --wait"
            ) from None
        link.send({"process": places.process})
        return link


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _refusal(messages: dict[int, Message | None]) -> str:
    """Why the processes cannot go on together; empty if they can."""
    for i, message in messages.items():
        if message is None:
            return _ended(i, "start all of them again")
        if message["error"]:
            return f"process {i}: {message['error']}"
    first: Any = messages[0]
    for i, message in messages.items():
        for name, value in (message or {})["values"].items():
            if value != first["values"].get(name):
                return (
                    f"expected the same {name} in all processes, got {first['values'].get(name)} in process 0 and "
                    f"{value} in process {i}: start them with the same options, text and versions"
                )
    return ""


def _ended(i: int, advice: str) -> str:
    return f"expected all processes to go on, got no sign of process {i}, which has ended: {advice}"
