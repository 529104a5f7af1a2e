# SPDX-License-Identifier: Apache-2.0
"""The rows as a picture: seconds of each contender, cell by cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

_COLOURS = {
    ("qemu", "qemu"): "#8c8c8c",
    ("qemu", "ours"): "#7fb3d5",
    ("ours", "qemu"): "#f0b27a",
    ("ours-assuming", "qemu"): "#f7dc6f",
    ("ours", "ours"): "#27ae60",
}


def draw(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Draw setup and transfer of each row as a bar, one group a cell."""
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.28 * len(rows)))
    labels = []
    for at, row in enumerate(rows):
        medians = row["median"]
        colour = _COLOURS[row["source"], row["destination"]]
        setup = medians["setup"]
        axes.barh(at, setup, color=colour, hatch="////", edgecolor="white")
        axes.barh(at, medians["total"] - setup, left=setup, color=colour)
        ratio = row["ratios"]["qemu"]["median"]
        axes.text(medians["total"], at, f" {ratio:.2f} x", va="center", fontsize=7)
        labels.append(
            f"{row['ram'] >> 20} MiB {row['content']} {row['mode']}: "
            f"{row['source']} to {row['destination']}"
        )
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_xlabel("seconds; setup hatched; x: of QEMU to QEMU, paired")
    axes.set_title(
        f"{about['kernel']}, {about['device']}, MTU {about['mtu']}, {about['qemu']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
