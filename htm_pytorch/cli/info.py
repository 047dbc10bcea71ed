"""`htm info`: what is installed here, and what it can do."""

import argparse
import json
from typing import Any


def taken(json: bool = False) -> None:
    """Take what `htm info` takes, so that it can be completed."""


COMMAND = taken


def main(arguments: list[str]) -> None:
    """Parse and print.

    By the standard library, so that it also runs where no extra is installed.
    """
    parser = argparse.ArgumentParser(
        "htm info", description="Say what is installed here, and what `auto` takes on each device."
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    wants_json = parser.parse_args(arguments).json
    from htm_pytorch.check.installation import installation

    found = installation()
    if wants_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in _lines(found):
        print(f"{name:17} {value}")


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    package, python, torch = found["htm_pytorch"], found["python"], found["torch"]
    lines = [
        ("htm_pytorch", f"{package['version']}, {package['folder']}"),
        ("python", f"{python['version']}, {python['platform']}"),
        ("torch", f"{torch['version']}, {torch['threads']} threads"),
        ("kernel", found["kernel"]["missing"] or "is there"),
    ]
    for device, chosen in found["devices"].items():
        reasons = "".join(f"; {name} {why}" for name, why in chosen["refused"].items())
        named = "" if chosen["name"] == device else f" ({chosen['name']})"
        lines.append((device, f"auto takes {chosen['auto']}{named}{reasons}"))
    for extra, packages in found["extras"].items():
        there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        missing = ", ".join(name for name, version in packages.items() if not version)
        told = [there] * bool(there) + [f"missing: {missing}"] * bool(missing)
        lines.append((f"extra {extra}", "; ".join(told)))
    for other in found["others"]:
        told = f"{other['name']} {other['version']} in {other['folder']} has the same import name"
        lines.append(("ALSO INSTALLED", told))
    return lines
