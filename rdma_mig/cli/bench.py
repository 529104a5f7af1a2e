# SPDX-License-Identifier: Apache-2.0
"""``rdma-migrate bench``: what two hosts give a migration, and what that means for a guest.

With ``--json`` it prints one object; README, "How fast will it be", has its keys, perftest's
among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rdma_mig.cli.options import index, size

if TYPE_CHECKING:
    from rdma_mig.host.bench import Bench, Plan
    from rdma_mig.host.prediction import Prediction
    from rdma_mig.waits import Cancel

__all__ = ["add_parser", "run"]

_MIB = 1 << 20
_STEP = 16 * _MIB
_DESCRIPTION = """\
Measure what a migration has at its disposal between two hosts: RDMA writes by size and number of
queue pairs, preparing memory, TCP beside it, and one real migration. bench --serve runs on the
other host. With --ram, and how fast the guest writes, it says how long a migration will take,
whether it converges, and whether to take RDMA or TCP.
"""


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not a number from 1 on")
    return int(text)


def _queue_pairs(text: str) -> int:
    from rdma_mig.host.bench import QUEUE_PAIRS_MAX

    number = _count(text)
    if number > QUEUE_PAIRS_MAX:
        raise argparse.ArgumentTypeError(f"{number} queue pairs, at most {QUEUE_PAIRS_MAX}")
    return number


def _milliseconds(text: str) -> float:
    from rdma_mig.cli.options import seconds

    return seconds(text) / 1000


def _whole(text: str) -> int:
    """A size in steps of 16 MiB, rounded up."""
    return -(-size(text) // _STEP) * _STEP


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` to the command's sub-parsers (what ``add_subparsers`` returned)."""
    parser = subparsers.add_parser(
        "bench",
        help="measure two hosts and the path between them, and predict a migration",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "host", nargs="?", metavar="HOST[:PORT]", help="where bench --serve runs; TCP port 18515"
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        const="",
        metavar="HOST[:PORT]",
        help="play the other part for one host; every address and TCP port 18515 by default",
    )
    device = parser.add_argument_group("device, where this host has several")
    device.add_argument("-d", "--ib-dev", "--rdma-device", metavar="NAME", help="use this device")
    device.add_argument("-x", "--gid-index", type=index, metavar="N", help="use this GID of it")
    writes = parser.add_argument_group("RDMA writes")
    writes.add_argument(
        "-s", "--size", type=size, metavar="SIZE",
        help="bytes of a write; 4K, 64K, 1M and 8M by default",
    )  # fmt: skip
    writes.add_argument(
        "-a", "--all", action="store_true", help="sizes from 4 KiB to 8 MiB, each twice the last"
    )
    writes.add_argument(
        "-n", "--iters", type=_count, metavar="N",
        help="writes of each measurement; by default as many as fill the memory four times",
    )  # fmt: skip
    writes.add_argument(
        "-q", "--qp", type=_queue_pairs, metavar="N",
        help="queue pairs that share the work, measured beside one; 2 by default",
    )  # fmt: skip
    writes.add_argument(
        "--region", type=_whole, default=256 * _MIB, metavar="SIZE",
        help="memory that is written to, in steps of 16M; 256M by default",
    )  # fmt: skip
    guest = parser.add_argument_group("prediction")
    guest.add_argument("--ram", type=size, metavar="SIZE", help="the guest's RAM, such as 16G")
    guest.add_argument(
        "--dirty-rate", type=size, metavar="SIZE",
        help="what the guest writes in a second, such as 200M (calc-dirty-rate in QEMU tells); 0 "
        "by default",
    )  # fmt: skip
    guest.add_argument(
        "--downtime", type=_milliseconds, default=0.3, metavar="MS",
        help="milliseconds that the guest may rest; 300 by default, as in QEMU",
    )  # fmt: skip
    guest.add_argument(
        "--trial", type=_whole, default=256 * _MIB, metavar="SIZE",
        help="memory of the real migration, in steps of 16M; 256M by default",
    )  # fmt: skip
    guest.add_argument("--no-trial", action="store_true", help="migrate nothing")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report_gbits", action="store_true", help="Gbit/s in place of MiB/s, as text"
    )
    output.add_argument("-j", "--json", action="store_true", help="JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, or serve.

    Raises:
        MigrationError: it failed; the exit status is the error's.
    """
    from rdma_mig.cli.signals import cancelled_by_signals
    from rdma_mig.errors import UsageError
    from rdma_mig.waits import Cancel

    if (args.host is None) == (args.serve is None):
        raise UsageError(
            "name the host that serves, or serve",
            remedy="rdma-migrate bench --serve there, rdma-migrate bench HOST here",
        )
    plan = _plan(args)
    with Cancel() as cancel, cancelled_by_signals(cancel.request):
        return _serve(args, cancel) if args.host is None else _measure(args, plan, cancel)


def _plan(args: argparse.Namespace) -> Plan:
    from rdma_mig.errors import UsageError
    from rdma_mig.host.bench import Plan

    sizes = tuple(4096 << step for step in (range(12) if args.all else (0, 4, 8, 11)))
    if args.size is not None:
        sizes = (args.size,)
    if max(sizes) > args.region:
        raise UsageError(
            f"writes of {max(sizes)} bytes into {args.region >> 20} MiB", remedy="a larger --region"
        )
    return Plan(
        sizes=sizes,
        queue_pairs=tuple(sorted({1, args.qp or 2})),
        iterations=args.iters,
        region=args.region,
        trial=0 if args.no_trial else args.trial,
        device=args.ib_dev,
        gid_index=args.gid_index,
    )


def _serve(args: argparse.Namespace, cancel: Cancel) -> int:
    from rdma_mig.errors import ExitStatus
    from rdma_mig.host.bench import serve
    from rdma_mig.host.meeting import DEFAULT_PORT, host_port
    from rdma_mig.verbs.endpoint import EndpointOptions
    from rdma_mig.verbs.host import require_rdma
    from rdma_mig.verbs.loading import load

    require_rdma()
    load()
    host, port = host_port(args.serve) if args.serve else ("0.0.0.0", DEFAULT_PORT)

    def listening(where: str) -> None:
        print(f"serving on {where}", file=sys.stderr, flush=True)

    options = EndpointOptions(device=args.ib_dev, gid_index=args.gid_index)
    peer = serve(host, port, cancel, listening, options)
    print(json.dumps({"peer": peer}) if args.json else f"measured with {peer}", flush=True)
    return int(ExitStatus.DONE)


def _measure(args: argparse.Namespace, plan: Plan, cancel: Cancel) -> int:
    from rdma_mig.errors import ExitStatus
    from rdma_mig.host.bench import measure
    from rdma_mig.host.meeting import host_port
    from rdma_mig.host.prediction import advise, predict
    from rdma_mig.verbs.host import require_rdma
    from rdma_mig.verbs.loading import load

    require_rdma()
    load()

    def say(what: str) -> None:
        print(f"measuring {what}", file=sys.stderr, flush=True)

    bench = measure(*host_port(args.host), plan, cancel, say)
    predictions: list[Prediction] = []
    if args.ram is not None:
        predictions = [
            predict(path, args.ram, float(args.dirty_rate or 0), args.downtime)
            for path in (bench.rdma, bench.tcp)
        ]
    advice = advise(*predictions) if predictions else ""
    if args.json:
        print(json.dumps(_as_json(bench, predictions, advice), indent=2))
    else:
        print("\n".join(_as_text(bench, predictions, advice, gbits=args.report_gbits)))
    return int(ExitStatus.DONE)


def _expected(bench: Bench) -> float:
    """What was predicted of the trial."""
    from rdma_mig.host.prediction import predict

    assert bench.trial is not None
    return predict(bench.rdma, bench.trial.bytes, 0.0, 0.3).total_seconds


def _off_percent(bench: Bench) -> float:
    assert bench.trial is not None
    return 100 * (bench.trial.seconds / _expected(bench) - 1)


def _as_json(bench: Bench, predictions: list[Prediction], advice: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "peer": bench.peer,
        "device": bench.device,
        "transport": bench.transport,
        "mtu": bench.mtu,
        "results": [
            {
                "MsgSize": row.size,
                "qp": row.queue_pairs,
                "n_iterations": row.iterations,
                "BW_peak": round(row.peak / _MIB, 2),
                "BW_average": round(row.average / _MIB, 2),
                "MsgRate": round(row.message_rate, 6),
            }
            for row in bench.rows
        ],
        "memory": {"local": asdict(bench.ours), "peer": asdict(bench.theirs)},
        "tcp": {"BW_average": round(bench.tcp_bytes_per_second / _MIB, 2)},
    }
    if bench.trial is not None:
        shown["migration"] = {
            **asdict(bench.trial),
            "predicted_seconds": round(_expected(bench), 6),
            "off_percent": round(_off_percent(bench), 1),
        }
    if predictions:
        shown["predictions"] = [asdict(prediction) for prediction in predictions]
        shown["advice"] = advice
    return shown


def _as_text(bench: Bench, predictions: list[Prediction], advice: str, *, gbits: bool) -> list[str]:
    unit, scale = ("Gb/sec", 8 / 1e9) if gbits else ("MiB/sec", 1 / _MIB)
    mtu = f", MTU {bench.mtu}" if bench.mtu else ""
    lines = [
        f"{bench.peer} over {bench.device} ({bench.transport}{mtu})",
        f" {'#bytes':>9} {'qp':>4} {'#iterations':>12} {f'BW peak[{unit}]':>18} "
        f"{f'BW average[{unit}]':>20} {'MsgRate[Mpps]':>14}",
    ]
    lines += [
        f" {row.size:>9} {row.queue_pairs:>4} {row.iterations:>12} {row.peak * scale:>18.2f} "
        f"{row.average * scale:>20.2f} {row.message_rate:>14.6f}"
        for row in bench.rows
    ]
    lines.append(f" TCP, one stream: {bench.tcp_bytes_per_second * scale:.2f} {unit}")
    for name, took in (("here", bench.ours), ("there", bench.theirs)):
        lines.append(
            f" memory {name}: {took.populate_seconds_per_gib:.3f} s per GiB to populate, "
            f"{took.register_seconds_per_gib:.3f} to register"
        )
    if bench.trial is not None:
        lines.append(
            f" a migration of {bench.trial.bytes >> 20} MiB took {bench.trial.seconds:.3f} s, "
            f"{_expected(bench):.3f} s were to be expected ({_off_percent(bench):+.0f} %)"
        )
    for one in predictions:
        how = "converges" if one.converges else "does not converge"
        lines.append(
            f" {one.path}: {how}; {one.total_seconds:.2f} s in all, {one.setup_seconds:.2f} s of "
            f"them to prepare memory; {one.downtime_seconds * 1000:.0f} ms of downtime, "
            f"{one.passes} passes"
        )
    if advice:
        lines.append(advice)
    return lines
