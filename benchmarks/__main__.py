"""`python -m benchmarks [command]`, which is what `zerolite bench [command]` runs."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "suite",
    "step": "step",
    "report": "report",
    "compare": "compare",
    "largest": "largest",
    "scale": "scale",
    "construct": "construct",
    "update": "update",
    "passes": "passes",
    "exchange": "exchange",
    "small": "small",
    "footprint": "footprint",
    "moments": "moments",
    "device": "device",
}


def listing() -> str:
    """Systems, models and presets by name."""
    from benchmarks.models import KNOWN
    from benchmarks.suite import PRESETS, default_device
    from benchmarks.systems import all_systems

    cuda = default_device() == "cuda"
    lines = ["commands: " + ", ".join(["list", *COMMANDS]), "presets: " + ", ".join(PRESETS), "models:"]
    lines += [f"  {name:14}{shape.count():>14,} parameters" for name, shape in KNOWN.items()]
    lines.append("systems (* in the short presets):")
    for name, system in all_systems().items():
        why = system.missing(1, cuda)
        lines.append(f"  {'*' if system.core else ' '} {name}{f'  (left out: {why})' if why else ''}")
    return "\n".join(lines)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "run"
    if command == "list":
        print(listing())
        return
    if command.startswith("-"):
        command = "run"
    elif command not in COMMANDS:
        print(f"zerolite bench: expected one of list, {', '.join(COMMANDS)}, or options, got {command!r}", file=sys.stderr)
        raise SystemExit(2)
    else:
        del sys.argv[1:2]
    importlib.import_module(f"benchmarks.{COMMANDS[command]}").main()


if __name__ == "__main__":
    main()
