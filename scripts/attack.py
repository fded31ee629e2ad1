"""Attack tlora_mlx: kill it, fill the disk, feed it damaged inputs; count what is lost.

    nice python scripts/attack.py --kills 500 --full-disks 10 --inputs 10000 --json attack.json

Four kinds of attack, all on the shipped example, in a directory that is deleted afterwards:

- kills: SIGKILL before the k-th change of files, for all k of training, resuming, planning, the
  report and each export, and then at random moments. Nothing may be half-written, and the same
  command again (training with --resume) must end with the same bytes as if nothing had happened.
- full disks: files cannot grow beyond some size (RLIMIT_FSIZE), up to that of the largest file.
- inputs: files of runs, adapters, models, data and options, damaged at random from a seed. Each
  must end with exit code 0, or with one sentence and 1 or 2: no traceback, no hang (20 seconds of
  processor time), nothing written.
- loads: 200,000 rows, 60 layers, 15,000 reports, and a clock that is set back.

Every attempt is a fork of this process, which has everything imported. The summary is printed at
the end; docs/RELIABILITY.md has one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from attacking.inputs import attack_inputs
from attacking.kills import attack_disk, attack_kills
from attacking.loads import attack_loads
from attacking.place import Place


def main() -> int:
    """The command line; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--loads", type=int, choices=(0, 1), default=1)
    parser.add_argument("--only", default="", help="operations whose names contain this")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop starting attempts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    deadline = time.monotonic() + options.seconds
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="tlora-attack-") as directory:
        place = Place(Path(directory), random.Random(options.seed), options.only)
        for name, attack, number in (
            ("kills", attack_kills, options.kills),
            ("full disks", attack_disk, options.full_disks),
            ("inputs", attack_inputs, options.inputs),
            ("loads", attack_loads, options.loads),
        ):
            start = saved = time.monotonic()
            for figures[name] in attack(place, number, deadline) if number else ():
                if options.json and time.monotonic() > saved + 10:
                    saved = time.monotonic()
                    options.json.write_text(json.dumps(figures, indent=1) + "\n")
            for kind, found in figures.get(name, {}).items():
                print(f"{name}, {kind}: {found}", flush=True)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    lost = [f for kinds in figures.values() for found in kinds.values() for f in found["lost"]]
    print(f"lost: {len(lost)}")
    for fault in lost:
        print(fault)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
