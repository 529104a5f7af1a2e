# SPDX-License-Identifier: Apache-2.0
"""A trace record as a line for people: when, who, what, how much."""

from __future__ import annotations

from rdma_mig.trace.grammar import sender_of
from rdma_mig.trace.reading import Numbered
from rdma_mig.words import printable, size_of

__all__ = ["describe", "line_of"]


def line_of(record: Numbered, role: str, before: float) -> str:
    """Return the line.

    Args:
        record: what is shown.
        role: of the trace.
        before: time of the record before it, seconds.
    """
    who, what, size = describe(record, role)
    t = record.record.t
    return f"{t:12.6f} {t - before:+11.6f}  {who:<11}  {what:<52} {size}".rstrip()


def describe(record: Numbered, role: str) -> tuple[str, str, str]:
    """Return who does it, what it is, and its size in words (empty where it has none)."""
    here = "source" if role == "outgoing" else "destination"
    who, what, size = _describe(record, role, here)
    return who, printable(what), size


def _describe(record: Numbered, role: str, here: str) -> tuple[str, str, str]:
    kind, get = record.record.kind, record.record.fields.get
    match kind:
        case "begin":
            return here, f"{role}, trace version {get('version')}", ""
        case "cm":
            status = f" (status {get('status')})" if get("status") else ""
            peer = f" {get('peer')}" if get("peer") else ""
            return "rdma_cm", f"{get('event')}{status}{peer}", ""
        case "connected":
            over = f"{get('device')}, " if get("device") else ""
            pinned = ", all RAM pinned" if get("pin_all") else ""
            return (
                here,
                f"connected {get('local')} - {get('peer')}, {over}{get('transport')}{pinned}",
                "",
            )
        case "out" | "in":
            channel = str(get("channel")).replace("return-path", "the return path")
            where = "" if channel == "control" else f" on {channel}"
            arrow = "->" if kind == "out" else "<-"
            length = size_of(record["length"]) if get("length") else ""
            return sender_of(role, kind).value, f"{arrow} {get('type')}{where}", length
        case "populate":
            return here, f"RAM populated in {get('seconds'):.6f} s", size_of(record["bytes"])
        case "register" | "deregister":
            chunk = "" if get("chunk") is None else f", chunk {get('chunk')}"
            took = f" in {get('seconds'):.6f} s" if kind == "register" else ""
            verb = "registered" if kind == "register" else "withdrawn"
            return here, f"{get('block')}{chunk} {verb}{took}", size_of(record["bytes"])
        case "phase":
            name = f"RAM phase {get('number')}" if get("number") else "setup phase"
            return here, f"{name}: {get('state')}", ""
        case "write":
            first, last = get("chunk"), get("last")
            chunks = f"chunk {first}" if first == last else f"chunks {first} to {last}"
            return (
                here,
                f"=> {get('writes')} writes, {get('block')}, {chunks}",
                size_of(record["bytes"]),
            )
        case "round":
            return here, f"round {get('number')}{', the last' if get('last') else ''}", ""
        case "wait":
            return here, f"waited {get('seconds'):.3f} s for {get('awaited')}", ""
        case "commit":
            return here, f"commit point: {get('state')} {get('by')}", ""
        case "end":
            message = f": {get('message')}" if get("message") else ""
            return here, f"{get('status')}{message}", ""
    fields = ", ".join(f"{name}={str(value)[:80]}" for name, value in record.record.fields.items())
    return here, f"{kind[:32]} {fields}"[:400], ""
