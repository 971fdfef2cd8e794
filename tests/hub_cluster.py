"""Packs a hub on an engine, one of whose processes is killed in the middle of a model: ENGINE ROOT OUT MARKER."""

import json
import os
import sys
from pathlib import Path

from tzip.hub import bulk


def deadly(job):
    """Packs a model as tasks do; the first to come to `fam/tuned` dies when its archive is written and has no name yet."""
    import tzip.hub.bulk as fresh

    marker = Path(os.environ["TZIP_TEST_MARKER"])
    if job.model.name == "fam/tuned" and not marker.exists():
        marker.touch()
        fresh.Shelf.publish_archive = lambda *_: os._exit(1)
    return fresh.__dict__["pack_model"](job)


def main() -> None:
    engine, root, out, marker = sys.argv[1:]
    os.environ["TZIP_TEST_MARKER"] = marker
    tell, bulk.pack_model = bulk.pack_model, deadly
    assert tell is not deadly
    report = bulk.pack_hub(root, out, engine=engine)
    print(json.dumps({
        "archives": {r.model: r.archive for r in report.receipts},
        "packed": report.packed,
        "failures": {name: f.message for name, f in report.failures.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
