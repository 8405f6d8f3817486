"""The bill of materials says what is installed, all of it, the same each time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path) -> dict:
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, str(ROOT / ".ci" / "sbom.py"), "--output", str(path)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return json.loads(path.read_text())


def test_the_bill(tmp_path):
    bill = write(tmp_path / "a.json")
    assert write(tmp_path / "b.json") == bill
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert bill["metadata"]["component"]["name"] == "toolmem"
    parts = {part["name"]: part for part in bill["components"]}
    for name, part in parts.items():
        assert part["version"] == importlib.metadata.version(name)
        assert part["purl"].startswith(f"pkg:pypi/{name}@") and part["bom-ref"] == part["purl"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0].lower()
        assert name in parts, name
    refs = {part["purl"] for part in parts.values()} | {bill["metadata"]["component"]["purl"]}
    edges = {entry["ref"]: set(entry["dependsOn"]) for entry in bill["dependencies"]}
    assert set(edges) == refs and all(needed <= refs for needed in edges.values())
    torch = parts["torch"]["purl"]
    assert torch in edges[bill["metadata"]["component"]["purl"]]
    assert (
        parts["jinja2"]["purl"] in edges[torch]
        and parts["markupsafe"]["purl"] in edges[parts["jinja2"]["purl"]]
    )
    assert sum("licenses" in part for part in parts.values()) > 0.9 * len(parts)
