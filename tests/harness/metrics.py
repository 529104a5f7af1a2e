# SPDX-License-Identifier: Apache-2.0
"""Metrics as Prometheus would take them: parsed by prometheus_client's own parser."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families


class Metrics:
    """What a metrics file or port says; its form is checked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(text):
            assert family.name.startswith("rdma_migrate_"), family.name
            assert family.documentation, family.name
            assert family.type in ("counter", "gauge"), family.name
            assert f"# HELP {family.samples[0].name} " in text, family.name
            assert f"# TYPE {family.samples[0].name} {family.type}\n" in text, family.name
            for sample in family.samples:
                # Base units, and a total where it only grows.
                assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
                assert not re.search(r"_(ms|kib|mib|milliseconds)(_|$)", sample.name)
                known = self.samples.setdefault(sample.name, {})
                key = frozenset(sample.labels.items())
                assert key not in known, sample
                known[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """The one sample of a metric that has these labels."""
        found = [
            value
            for key, value in self.samples[f"rdma_migrate_{name}"].items()
            if labels.items() <= dict(key).items()
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of all samples of a metric."""
        return [dict(key) for key in self.samples.get(f"rdma_migrate_{name}", {})]
