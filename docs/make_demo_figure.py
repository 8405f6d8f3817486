"""Takes the README's picture and numbers from a demo that has run.

    python docs/make_demo_figure.py runs/demo

Writes docs/assets/demo.svg, and prints the rows of the tables in README.md and docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from toolmem.files import write_text

PICTURE = Path(__file__).parent / "assets" / "demo.svg"


def picture(report: str) -> str:
    """The report's figure, on a white sheet so that it can be read on dark pages too."""
    svg = report[report.index("<svg") : report.index("</svg>") + len("</svg>")]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    svg = f'{head}>\n<rect width="100%" height="100%" fill="#ffffff"/>{rest}'
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


def recall(score: dict) -> str:
    """A score with its counts and interval."""
    low, high = score["interval_95"]
    counts = f"{score['correct']}/{score['total']}; {low:.3f}–{high:.3f}"
    return f"{score['recall']:.3f} ({counts})"


def main(folder: Path) -> None:
    """Write the picture, print the rows."""
    write_text(PICTURE, picture((folder / "report.html").read_text(encoding="utf-8")))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    print(f"seed {results['seed']}")
    for model in results["models"]:
        cells = [model["title"], *(f"{model[key]:,}" for key in ("facts", "parameters"))]
        cells += [f"{model[key]:,}" for key in ("steps", "tokens")]
        cells += [recall(model["recall"][split]) for split in ("known", "unseen")]
        print("| " + " | ".join([*cells, f"{model['seconds']:.0f}"]) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
