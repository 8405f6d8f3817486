"""The page of a run's circuits: curves over its checkpoints, and a slider through them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from toolmem.analysis.circuits.evolution import COPIES, Material, Removed, Snapshot, leading
from toolmem.analysis.circuits.nodes import Node
from toolmem.analysis.circuits.pictures import draw_attention, draw_curves
from toolmem.analysis.report import Panel, data_uri, write_files, write_report
from toolmem.data.text.token_table import ASSISTANT
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from torch import Tensor

    from toolmem.data.tokenizers import Tokenizer

MOST_HEADS = 16  # whose attention is shown
MOST_NEURONS = 10  # that a table shows
LEAD = (
    "What each head of the model looks at, what each part does for what it says, and where an answer can be "
    "read, at every checkpoint that the run kept. A head is named block.head, both counted from 0."
)
SCORE_TEXT = (
    "Previous token and induction are measured on random tokens told twice: the mean weight that a head "
    "gives the token before, and the token that followed the present one the last time. Copying is measured "
    "on dialogues: the weight on the token that is about to be written, where it stands earlier. OV "
    "eigenvalues say how far a head would say what it looks at (1), or its opposite (-1)."
)


def write_page(
    out: str | Path,
    given: Material,
    found: Sequence[Snapshot],
    tokenizer: Tokenizer,
    *,
    title: str,
    removed: Removed | None = None,
    circumstances: Iterable[tuple[str, str]] = (),
) -> list[Path]:
    """Write the page, and beside it its figures as PNG and CSV.

    Args:
        out: the page, .html; its figures begin with its name.
        given: the dialogues measured on.
        found: measurements by step, one at least.
        tokenizer: the model's.
        title: the page's heading.
        removed: what the last model recalls without its parts.
        circumstances: (name, value) pairs that say how it was made.

    Returns:
        the files written, the page first.

    Raises:
        ToolmemError: for another ending, or a file that cannot be written.
    """
    path = Path(out)
    if path.suffix != ".html":
        raise ToolmemError(f"out: {path} must end in .html")
    panels = [*_curves(path.stem, given, found), *_removals(path.stem, removed)]
    tokens = shown_tokens(given.told[0].tokens, tokenizer)
    said = " / ".join(turn.text for turn in given.told[0].dialogue.turns)
    slider = Panel(
        f"{path.stem}_checkpoints",
        f"At each checkpoint; attention and probabilities in the dialogue: {said}",
        heading="Checkpoint by checkpoint",
        picture=_slider(given, found, tokens),
    )
    write_report(
        path, title=title, lead=LEAD, panels=[*panels, slider], circumstances=circumstances
    )
    heads = {node: found[-1].weights[node] for node in _shown_heads(found)}
    attention = Panel(f"{path.stem}_attention", "", draw_attention(heads, tokens))
    return [path, *write_files([*panels, attention], path.parent, ("png", "csv"))]


def shown_tokens(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Each token as one reads it: roles by a sign, what is no text of its own by a dot."""
    signs = {token: _SIGNS[role] for role, token in tokenizer.role_ids.items()}
    texts = [signs.get(int(token)) or tokenizer.decode([int(token)]) for token in tokens]
    return [
        "·" if "�" in text else text.replace("\n", "⏎").replace(" ", "␣") or "·" for text in texts
    ]


_SIGNS = {"user": "▸", "assistant": "◂", "database": "▪", "end": "■"}


def _shown_heads(found: Sequence[Snapshot]) -> list[Node]:
    return leading((one.scores for one in found), MOST_HEADS)


def _curves(stem: str, given: Material, found: Sequence[Snapshot]) -> list[Panel]:
    """Curves over steps."""
    steps = [one.step for one in found]
    heads = [node.label for node in leading((one.scores for one in found), 8)]
    scores = {
        name: {
            node.label: [one.scores[name][node] for one in found] for node in found[0].scores[name]
        }
        for name in found[0].scores
    }
    between = {name: c for name, c in scores.items() if name != "OV eigenvalues"}
    panels = [
        Panel(
            f"{stem}_scores",
            "Scores of heads over steps; beyond the eight that score highest they are grey.",
            draw_curves(steps, between, heads),
            records=_records("head", steps, scores),
            heading="Heads over training",
            text=SCORE_TEXT,
        )
    ]
    ablated = {
        f"{part} exact": {
            "whole model": [one.exact[part] for one in found],
            **{
                f"without {node.label}": [one.without[node][part] for one in found]
                for node in found[0].without
            },
        }
        for part in found[0].exact
    }
    last = found[-1]
    order = sorted(last.without, key=lambda node: min(last.without[node].values()))
    panels.append(
        Panel(
            f"{stem}_ablation",
            "The share of dialogues whose query, or answer, is the likeliest token by token, what stands "
            "before it given right; each head or feed-forward replaced by its mean over these dialogues.",
            draw_curves(steps, ablated, ["whole model", *(f"without {n.label}" for n in order)]),
            records=_records("model", steps, ablated),
            heading="Without a part",
        )
    )
    if last.probed:
        places = list(dict.fromkeys(place for _, place in last.probed))
        points = list(dict.fromkeys(point for point, _ in last.probed))
        probed = {
            place: {
                **{point: [one.probed[point, place].accuracy for one in found] for point in points},
                "shuffled labels": [one.probed[points[-1], place].control for one in found],
            }
            for place in places
        }
        attribute = given.probed[0].dialogue.attribute
        guess = next(iter(last.probed.values())).guess
        panels.append(
            Panel(
                f"{stem}_probe",
                f"Accuracy of a linear probe for the first token of {attribute}, cross-validated over "
                f"{len(given.probed)} people; the most frequent one alone is right for {guess:.2f} of them.",
                draw_curves(steps, probed, [*points[-7:], "shuffled labels"]),
                records=_records("point", steps, probed),
                heading="Where the answer is readable",
            )
        )
    return panels


def _removals(stem: str, removed: Removed | None) -> list[Panel]:
    """Tables of what the last model recalls without its parts."""
    if removed is None:
        return []
    scores = {"whole model": removed.whole.overall}
    scores |= {f"without {node.label}": r.overall for node, r in removed.recall.items()}
    rows = [
        [name, f"{s.fraction:.3f}", f"{s.interval[0]:.3f} to {s.interval[1]:.3f}", s.total]
        for name, s in scores.items()
    ]
    panels = [
        Panel(
            f"{stem}_recall",
            "Recall of the last checkpoint: dialogues generated greedily, tools in the loop.",
            table=(("model", "recall", "95 % interval", "questions"), rows),
            heading="Recall without a part",
        )
    ]
    if removed.neurons:
        parts = list(next(iter(removed.neurons.values())))
        order = sorted(removed.neurons, key=lambda node: sum(removed.neurons[node].values()))
        cells = {
            node.label: [f"{removed.neurons[node][part]:.3f}" for part in parts] for node in order
        }
        every = [[name, *values] for name, values in cells.items()]
        heads = ("neuron", *(f"{part} exact" for part in parts))
        panels.append(
            Panel(
                f"{stem}_neurons",
                f"The {min(MOST_NEURONS, len(every))} of {len(every)} neurons without which fewest dialogues "
                "are exact; the CSV has all.",
                table=(heads, every[:MOST_NEURONS]),
                records=(heads, every),
                heading="Without a neuron",
            )
        )
    return panels


def _records(
    of: str, steps: Sequence[int], curves: dict[str, dict[str, list[float]]]
) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [step, name, line, values[i]]
        for i, step in enumerate(steps)
        for name, by_line in curves.items()
        for line, values in by_line.items()
    ]
    return ["step", "what", of, "value"], rows


def _slider(given: Material, found: Sequence[Snapshot], tokens: list[str]) -> str:
    """The part of the page that a slider moves through, as HTML with its data and its script."""
    environment = Environment(
        loader=PackageLoader("toolmem.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heads = _shown_heads(found)
    data = {
        "steps": [one.step for one in found],
        "tokens": tokens,
        "heads": [
            {"label": node.label, "images": [_grey(one.weights[node]) for one in found]}
            for node in heads
        ],
        "tables": [table for table in _tables(given, found, tokens) if table["rows"]],
    }
    return environment.get_template("circuits.html.jinja").render(
        data=data, left_out=len(found[-1].weights) - len(heads)
    )


def _grey(weights: Tensor) -> str:
    """Weights as a picture of a pixel each, black for all."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, (255 - weights)[..., None].expand(-1, -1, 3).numpy(), format="png")
    return data_uri(buffer.getvalue(), "png")


def _tables(
    given: Material, found: Sequence[Snapshot], tokens: list[str]
) -> Iterable[dict[str, Any]]:
    """Heat-maps: rows, columns, and a value of each at every checkpoint."""
    last = found[-1]

    def table(
        title: str, note: str, rows: dict[str, Any], columns: dict[str, Any], value: Any
    ) -> dict[str, Any]:
        values = [
            [
                [_number(value(one, row, column)) for column in columns.values()]
                for row in rows.values()
            ]
            for one in found
        ]
        return {
            "title": title, "note": note, "rows": list(rows), "columns": list(columns), "values": values,
        }  # fmt: skip

    heads = {node.label: node for node in last.weights}
    names = {name: name for name in last.scores}
    yield table(
        "Scores", "1 for all of the attention; of OV eigenvalues, from -1 to 1.", heads, names,
        lambda one, row, column: one.scores[column].get(row),
    )  # fmt: skip
    parts = {node.label: node for node in last.without}
    yield table(
        "Activation patching",
        "How much of the difference between two answers a part restores, taken from the dialogue that has "
        "the right one: 1 for all. Empty where the model does not tell the two apart yet.",
        parts, {COPIES[what]: what for what in given.contrasts},
        lambda one, row, column: one.patched.get(column, {}).get(row),
    )  # fmt: skip
    yield table(
        "Without a part", "The share of dialogues that are exact with each part replaced by its mean.",
        {"whole model": None, **parts}, {part: part for part in last.exact},
        lambda one, row, column: (one.exact if row is None else one.without[row])[column],
    )  # fmt: skip
    yield table(
        "Direct effect on the logits",
        "How far each head by itself raises the logit of the token that is copied over the mean token's.",
        {node.label: node for node in next(iter(last.effects.values()), {})},
        {COPIES[what]: what for what in last.effects},
        lambda one, row, column: one.effects[column].get(row),
    )  # fmt: skip
    written = [
        i for i in range(1, len(tokens)) if given.told[0].roles[i] == ASSISTANT
        and i > given.told[0].places["end of question"]
    ]  # fmt: skip
    yield table(
        "Logit lens", "The probability of each token that the assistant writes, read after each block.",
        {point: point for point in last.lens}, {f"{tokens[i]}\u200b{i}": i for i in written},
        lambda one, row, column: one.lens[row][column - 1],
    )  # fmt: skip
    points = dict.fromkeys(point for point, _ in last.probed)
    yield table(
        "Linear probes", "Accuracy for the answer's first token, after each block and at each place.",
        {point: point for point in points}, {p: p for p in dict.fromkeys(p for _, p in last.probed)},
        lambda one, row, column: one.probed[row, column].accuracy,
    )  # fmt: skip


def _number(value: Any) -> float | None:
    """Rounded, as plain data; None for nothing."""
    if value is None or value != value:
        return None
    return round(float(value), 3)
