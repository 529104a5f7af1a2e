# SPDX-License-Identifier: Apache-2.0
"""One run of the virtual machine: QEMU's command line, the ports to the guest, its end."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from labvm.host import LabError, need

BOOT_SECONDS = 180.0


class TimedOut(Exception):
    """The time for the command ran out."""


@dataclass(frozen=True)
class Settings:
    """What the machine is made of."""

    accel: str
    memory: str
    cpus: int
    image: Path
    initramfs: Path
    console: Path
    shares: list[Path] = field(default_factory=list)
    host_root: bool = True
    append: str = ""

    def command(self, ports: dict[str, int]) -> list[str]:
        """Return QEMU's command line; `ports` maps port names to socket file descriptors."""
        accel = {
            "kvm": ["-accel", "kvm", "-cpu", "host"],
            # Five-level page tables only cost where each walk is emulated.
            "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"],
        }[self.accel]
        # setpriv: no machine outlives the process that started it, however that one ends.
        line = [need("setpriv"), "--pdeathsig", "KILL", need("qemu-system-x86_64")]
        line += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", *accel]
        line += ["-m", self.memory, "-smp", str(self.cpus)]
        line += ["-kernel", str(self.image), "-initrd", str(self.initramfs)]
        # mitigations=off: nothing in a throw-away machine is to be kept from its own root.
        line += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {self.append}".strip()]
        line += ["-chardev", f"file,id=console,path={_escape(self.console)}"]
        line += ["-serial", "chardev:console", "-device", "virtio-rng-pci"]
        line += ["-device", "virtio-serial-pci"]
        for number, (name, descriptor) in enumerate(ports.items(), start=1):
            device = "virtconsole" if name == "terminal" else "virtserialport"
            line += ["-chardev", f"socket,id={name},fd={descriptor}"]
            line += ["-device", f"{device},chardev={name},name={name},nr={number}"]
        if self.host_root:
            line += ["-virtfs", _export(Path("/"), "hostroot", "none,readonly=on")]
        # As root, files in a share get the owner that they have in the lab.
        model = "passthrough" if os.geteuid() == 0 else "none"
        for number, share in enumerate(self.shares):
            line += ["-virtfs", _export(share, f"share{number}", model)]
        return line


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


def _export(path: Path, tag: str, model: str) -> str:
    return (
        f"local,path={_escape(path)},mount_tag={tag},id={tag},"
        f"security_model={model},multidevs=remap"
    )


class Output:
    """Passes one stream of the command on, up to the mark that the guest puts at its end."""

    def __init__(self, end: str, write: Callable[[bytes], None]) -> None:
        self._mark = b"\0" + end.encode()
        self._held = b""
        self._write = write
        self.ended = False

    def feed(self, data: bytes) -> None:
        if self.ended:
            return
        data = self._held + data
        at = data.find(self._mark)
        if at >= 0:
            self.ended = True
            data, self._held = data[:at], b""
        else:
            # What may be the beginning of the mark waits for more.
            keep = data.rfind(b"\0", max(0, len(data) - len(self._mark)))
            if keep >= 0 and not self._mark.startswith(data[keep:]):
                keep = -1
            data, self._held = (data, b"") if keep < 0 else (data[:keep], data[keep:])
        if data:
            self._write(data)


class Machine:
    """A running virtual machine. Use as a context manager: leaving it ends the machine."""

    def __init__(self, settings: Settings, outputs: dict[str, Callable[[bytes], None]]) -> None:
        """Start it. `outputs` maps port names to what takes the bytes that arrive there."""
        self.settings = settings
        self.last_step = "boot loader"
        self.status: int | None = None
        self.failure: str | None = None
        self.seen: set[str] = set()
        self._outputs: tuple[Output, ...] = ()
        self._lines = b""
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[str, socket.socket] = {}
        self._process: subprocess.Popen[bytes] | None = None
        theirs: dict[str, socket.socket] = {}
        try:
            for name, take in {**outputs, "status": self._status_bytes}.items():
                ours, theirs[name] = socket.socketpair()
                self._sockets[name] = ours
                self._selector.register(ours.fileno(), selectors.EVENT_READ, take)
            descriptors = {name: end.fileno() for name, end in theirs.items()}
            command = settings.command(descriptors)
            with Path(f"{settings.console}.qemu").open("wb") as said:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=list(descriptors.values()),
                    # Ctrl-C is ours to handle: a QEMU in our group would get it too.
                    start_new_session=True,
                )
        except BaseException:
            self.close()
            raise
        finally:
            for end in theirs.values():
                end.close()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine; nothing of it is left running."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for end in self._sockets.values():
            end.close()
        self._selector.close()

    def add_input(self, descriptor: int, take: Callable[[bytes], None]) -> None:
        """Hand what can be read from `descriptor` to `take` while the machine is pumped."""
        self._selector.register(descriptor, selectors.EVENT_READ, take)

    def send(self, port: str, data: bytes) -> None:
        self._sockets[port].sendall(data)

    def _status_bytes(self, data: bytes) -> None:
        *lines, self._lines = (self._lines + data).split(b"\n")
        for raw in lines:
            word, _, rest = raw.decode(errors="replace").partition(" ")
            self.seen.add(word)
            if word == "step":
                self.last_step = rest
            elif word == "failed":
                self.failure = rest
            elif word == "exit":
                self.status = int(rest)

    def pump(self, done: Callable[[], bool], deadline: float) -> bool:
        """Move bytes until `done()`, the deadline (False), or the machine's end (False)."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or self.failure is not None:
                return False
            events = self._selector.select(min(left, 1.0))
            for key, _ in events:
                data = b""
                with contextlib.suppress(OSError):
                    data = os.read(key.fd, 65536)
                if data:
                    key.data(data)
                else:
                    self._selector.unregister(key.fd)
            if not events and not self.running:
                return done()
        return True

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def boot(self, until: str, deadline: float) -> None:
        """Wait for the guest's word `until`; raise LabError or TimedOut where it does not come."""
        limit = min(deadline, time.monotonic() + BOOT_SECONDS)
        if self.pump(lambda: until in self.seen, limit):
            return
        if self.failure is not None:
            step, _, why = self.failure.partition(": ")
            raise LabError(step, why)
        if not self.running:
            raise LabError(self.last_step, f"the machine ended: {self._last_words()}")
        if time.monotonic() >= deadline:
            raise TimedOut(f"before the command began (boot step: {self.last_step})")
        raise LabError(self.last_step, f"not done after {BOOT_SECONDS:.0f} s")

    def wait_for(self, *outputs: Output) -> None:
        """Make `finish` wait for the end of these streams too."""
        self._outputs = outputs

    def finish(self, deadline: float) -> int:
        """Wait for the command's end and return its exit status; else TimedOut or LabError."""

        def done() -> bool:
            return self.status is not None and all(output.ended for output in self._outputs)

        if not self.pump(done, deadline):
            if self.running:
                raise TimedOut("while the command ran")
            raise LabError("job", f"the machine ended before its command: {self._last_words()}")
        assert self.status is not None
        if not self._outputs:
            # A terminal's stream has no mark at its end: take what is still on its way.
            self.pump(lambda: False, time.monotonic() + 0.2)
        return self.status

    def _last_words(self) -> str:
        for path in (Path(f"{self.settings.console}.qemu"), self.settings.console):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1].strip()
        return "it said nothing"
