"""Writes a bill of materials of what is installed: CycloneDX 1.6, JSON, without the network.

    python .ci/sbom.py [--output sbom.json]

Components are toolmem and all that it needs, extras that are installed among them, as the metadata of this
environment say. The same environment gives the same file, but for the time it was made (SOURCE_DATE_EPOCH).
"""

from __future__ import annotations

import argparse
import importlib.metadata as installed
import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = "toolmem"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/toolmem")


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(distribution: installed.Distribution) -> set[str]:
    """Installed distributions that one asks for, its extras' among them."""
    names = {
        canonical(re.match(r"[\w.-]+", text)[0])  # type: ignore[index]
        for text in distribution.requires or ()
    }
    return {name for name in names if name in DISTRIBUTIONS} - {canonical(distribution.name)}


DISTRIBUTIONS = {canonical(found.name): found for found in installed.distributions() if found.name}


def licences(distribution: installed.Distribution) -> list[dict[str, Any]]:
    """What a distribution says of its licence: an SPDX expression, or words."""
    expression = distribution.metadata.get("License-Expression")
    if expression:
        return [{"expression": expression}]
    trove = [
        line.rpartition(" :: ")[2]
        for line in distribution.metadata.get_all("Classifier") or ()
        if line.startswith("License :: ")
    ]
    words = trove or [(distribution.metadata.get("License") or "").strip().partition("\n")[0]]
    return [{"license": {"name": word}} for word in words if word and word != "UNKNOWN"]


def component(name: str) -> dict[str, Any]:
    """A distribution as a component."""
    distribution = DISTRIBUTIONS[name]
    version = distribution.version
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    if summary := distribution.metadata.get("Summary"):
        found["description"] = summary
    if says := licences(distribution):
        found["licenses"] = says
    return found


def bill() -> dict[str, Any]:
    """The whole bill."""
    waiting, reached = [ROOT], {}
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached[name] = sorted(needed(DISTRIBUTIONS[name]))
            waiting += reached[name]
    parts = {name: component(name) for name in sorted(reached)}
    moment = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    content = json.dumps(parts, sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, content)}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
            "component": parts[ROOT],
        },
        "components": [part for name, part in parts.items() if name != ROOT],
        "dependencies": [
            {
                "ref": parts[name]["bom-ref"],
                "dependsOn": [parts[n]["bom-ref"] for n in reached[name]],
            }
            for name in sorted(reached)
        ],
    }


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", default="sbom.json", metavar="FILE")
    options = parser.parse_args()
    found = bill()
    Path(options.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{options.output}: {len(found['components'])} components")


if __name__ == "__main__":
    main()
