"""Figures of the proofs: one JSON file per part, so that a cut run of ``make torture`` continues where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable
from typing import Any

from conftest import ROOT

RESULTS = ROOT / "outputs" / "torture"
_PROVEN = ("pmoe_lightning", "callbacks", "conf")


@functools.cache
def source_digest() -> str:
    """Of all the code and configuration that is put to the proof: figures of other code do not count."""
    digest = hashlib.sha256()
    for folder in _PROVEN:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cell(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of one part of a proof: those on file if this same code has been through it, else measured now."""
    path = RESULTS / f"{name}.json"
    if path.exists() and (known := json.loads(path.read_text()))["source"] == source_digest():
        print(f"{name} (on file): {known['figures']}")
        return known["figures"]
    start = time.monotonic()
    figures = measure()
    head = {"name": name, "source": source_digest(), "python": platform.python_version()}
    content = json.dumps(head | {"seconds": round(time.monotonic() - start, 1), "figures": figures})
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(content + "\n")
    partial.rename(path)
    print(f"{name}: {figures}")
    return figures
