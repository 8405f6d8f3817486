"""Draws the concept pictures as SVG: dialogues token by token, attention's masks, synthetic tasks.

    python docs/make_figures.py            writes docs/assets/dialogue_*.svg, masks.svg, synthetic_tasks.svg

The tokens, roles, loss and masks are the library's own, so the pictures cannot drift from it.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from pathlib import Path

import torch

from toolmem.data import (
    Batch,
    ByteTokenizer,
    MADDataModule,
    RecallDataModule,
    TemplateSet,
    encode_dialogue,
    make_population,
)
from toolmem.data.text.dialog_tokens import foreign_spans
from toolmem.files import write_text
from toolmem.models.masks import attention_mask, causal_mask

ASSETS = Path(__file__).parent / "assets"
ASSISTANT = 2
NAMES = {0: "none", 1: "user", 2: "assistant", 3: "database"}
COLOURS = {1: "#0b7285", 2: "#2b7a0b", 3: "#9c36b5"}
CELL, HIGH, PER_ROW, MARGIN, STRIDE = 15, 20, 56, 12, 36
WIDE = {"user": 62, "assistant": 90, "database": 82, "end": 54}


def cells(setting: str) -> list[tuple[str, int, bool, int]]:
    """(label, role code, bears loss, width in pixels) of every token of one dialogue."""
    tokenizer = ByteTokenizer()
    questions = TemplateSet.load(setting).questions(make_population(1))
    tokens, roles = encode_dialogue(questions.dialogue(0), tokenizer)
    names = {number: role for role, number in tokenizer.role_ids.items()}
    found = []
    for place, (token, role) in enumerate(zip(tokens.tolist(), roles.tolist(), strict=True)):
        if token in names:
            label, width = f"<|{names[token]}|>", WIDE[names[token]]
        else:
            label, width = chr(token), CELL
        # The first token of a dialogue is given: nothing comes before it to predict it from.
        found.append((label, role, role == ASSISTANT and place > 0, width))
    return found


def draw(setting: str) -> str:
    """The picture of one setting."""
    limit = PER_ROW * CELL
    shapes, x, y = [], 0, 46
    for label, role, loss, width in cells(setting):
        if x + width > limit:
            x, y = 0, y + STRIDE
        colour = COLOURS[role]
        left, middle = MARGIN + x, MARGIN + x + width / 2
        text = "\u2423" if label == " " else label
        size = 10 if len(label) > 1 else 12
        shapes.append(
            f'<rect x="{left}" y="{y}" width="{width - 1}" height="{HIGH}" rx="2" fill="{colour}" '
            f'fill-opacity="{0.28 if loss else 0.1}"/>'
            f'<text x="{middle:g}" y="{y + 14}" font-size="{size}" text-anchor="middle" '
            f'fill="{colour}">{escape(text)}</text>'
        )
        if loss:
            shapes.append(
                f'<rect x="{left}" y="{y + HIGH + 2}" width="{width - 1}" height="4" fill="#c92a2a"/>'
            )
        x += width
    all_cells = cells(setting)
    bearing = sum(loss for _, _, loss, _ in all_cells)
    title = f"{setting.replace('_', '-')}: {len(all_cells)} tokens, {bearing} of them bear loss"
    legend, at = [], MARGIN
    for role in sorted({role for _, role, _, _ in all_cells}):
        legend.append(
            f'<rect x="{at}" y="26" width="10" height="10" rx="2" fill="{COLOURS[role]}"/>'
            f'<text x="{at + 15}" y="35" font-size="12" fill="#444">{NAMES[role]}</text>'
        )
        at += 95
    legend.append(
        f'<rect x="{at}" y="30" width="20" height="4" fill="#c92a2a"/>'
        f'<text x="{at + 26}" y="35" font-size="12" fill="#444">bears loss</text>'
    )
    width, height = limit + 2 * MARGIN, y + STRIDE + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="ui-monospace, Menlo, Consolas, monospace">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        f'<text x="{MARGIN}" y="17" font-size="13" font-weight="bold" fill="#222">'
        f"{escape(title)}</text>\n" + "\n".join(legend + shapes) + "\n</svg>\n"
    )


SIDE, GAP, AXIS, TOP = 330, 44, 84, 92  # of the masks' panels, in pixels


def dialogue_roles(setting: str, numbers: range) -> list[torch.Tensor]:
    """Role codes of the tokens that a model is given of some dialogues; the last is only a target."""
    questions = TemplateSet.load(setting).questions(make_population(4))
    return [
        torch.as_tensor(encode_dialogue(questions.dialogue(i), ByteTokenizer())[1][:-1])
        for i in numbers
    ]


def masks() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(title, role codes (n,), mask (n, n) bool) of each panel."""
    [roles] = dialogue_roles("in_tool", range(1))
    n = len(roles)
    spans = foreign_spans(roles[None].numpy())
    prefix = attention_mask(torch.arange(n), spans=spans)
    several = dialogue_roles("in_weight", range(3))
    documents = torch.repeat_interleave(
        torch.arange(3), torch.tensor([len(part) for part in several])
    )
    packed = attention_mask(torch.arange(len(documents)), documents=documents[None])
    return [
        ("causal: an in-tool dialogue", roles, causal_mask(n)),
        ("packed: three in-weight dialogues", torch.cat(several), packed[0, 0]),
        ("prefix: the in-tool dialogue", roles, prefix[0, 0]),
    ]


def panel(title: str, roles: torch.Tensor, mask: torch.Tensor, left: float) -> list[str]:
    """One mask: a row for each token that looks, a column for each token that is looked at."""
    n = len(roles)
    cell = SIDE / n
    shapes = [
        f'<text x="{left}" y="{TOP - 34}" font-size="13" font-weight="bold" fill="#222">'
        f"{escape(title)}</text>",
        f'<rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="#f4f5f7"/>',
    ]
    paths: dict[str, list[str]] = {"#8496a9": []} | {colour: [] for colour in COLOURS.values()}
    index = torch.arange(n)
    ahead = mask & (index[:, None] < index)
    for part, colour_of in (
        (mask & ~ahead, lambda row: "#8496a9"),
        (ahead, lambda row: COLOURS[row]),
    ):
        for row in range(n):
            place = 0
            for seen, run in groupby(part[row].tolist()):
                length = len(list(run))
                if seen:
                    paths[colour_of(int(roles[row]))].append(
                        f"M{left + place * cell:.1f} {TOP + row * cell:.1f}h{length * cell:.1f}"
                        f"v{cell:.2f}h{-length * cell:.1f}z"
                    )
                place += length
    shapes += [f'<path fill="{c}" d="{"".join(d)}"/>' for c, d in paths.items() if d]
    place = 0
    for role, run in groupby(roles.tolist()):
        length = len(list(run))
        at, wide, colour = place * cell, length * cell, COLOURS[role]
        shapes += [
            f'<rect x="{left + at:.1f}" y="{TOP - 9}" width="{wide:.1f}" height="6" fill="{colour}"/>',
            f'<rect x="{left - 9}" y="{TOP + at:.1f}" width="6" height="{wide:.1f}" fill="{colour}"/>',
        ]
        if wide > 34:
            shapes.append(
                f'<text x="{left + at + wide / 2:.1f}" y="{TOP - 14}" font-size="11" '
                f'text-anchor="middle" fill="{colour}">{NAMES[role]}</text>'
            )
        if wide > 14:
            shapes.append(
                f'<text x="{left - 13}" y="{TOP + at + wide / 2 + 4:.1f}" font-size="11" '
                f'text-anchor="end" fill="{colour}">{NAMES[role]}</text>'
            )
        place += length
    return shapes


def draw_masks() -> str:
    """The picture of the masks."""
    shapes: list[str] = []
    panels = masks()
    for number, (title, roles, mask) in enumerate(panels):
        shapes += panel(title, roles, mask, AXIS + number * (SIDE + GAP + AXIS))
    width = len(panels) * (SIDE + GAP + AXIS)
    height = TOP + SIDE + 16
    title = "Which token (row) looks at which (column)"
    legend = (
        f'<text x="{MARGIN}" y="20" font-size="14" font-weight="bold" fill="#222">{title}</text>'
        f'<rect x="{MARGIN}" y="29" width="10" height="10" fill="#8496a9"/>'
        f'<text x="{MARGIN + 15}" y="38" font-size="12" fill="#444">itself and back</text>'
    )
    for number, role in enumerate((1, 3)):
        at = MARGIN + 140 + 215 * number
        legend += (
            f'<rect x="{at}" y="29" width="10" height="10" fill="{COLOURS[role]}"/>'
            f'<text x="{at + 15}" y="38" font-size="12" fill="#444">ahead, within the {NAMES[role]}\'s</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="ui-monospace, Menlo, Consolas, monospace">\n'
        f"<title>{title}</title>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        + "\n".join([legend, *shapes])
        + "\n</svg>\n"
    )


def task_rows() -> list[tuple[str, Batch, list[str], dict[int, str]]]:
    """(title, one row, names of its symbols, colours of some of them) of every synthetic task."""
    small = {"batch_size": 1, "val_batches": 1, "seed": 5}
    letters, values = list("ABCD"), list("wxyz")
    red, grey = "#c92a2a", "#868e96"
    key_value = {**dict.fromkeys(range(4), "#0b7285"), **dict.fromkeys(range(4, 8), "#2b7a0b")}
    mqar = RecallDataModule(32, 24, 3, random_non_queries=False, **small)
    names = ["·", *(f"{n}" for n in range(1, 32))]
    tones = {
        0: grey,
        **dict.fromkeys(range(1, 16), "#0b7285"),
        **dict.fromkeys(range(16, 32), "#2b7a0b"),
    }
    found = [("MQAR", mqar.generator(1).batch_at(0), names, tones)]
    signs = {6: grey, 7: red}
    for title, task, options, symbols, colours in (
        ("in-context recall", "in_context_recall", {}, letters + values, key_value),
        (
            "noisy recall",
            "noisy_recall",
            {"vocab_size": 12, "noise_vocab_size": 4},
            [*letters, *values, *"#%&@"],
            key_value | dict.fromkeys(range(8, 12), red),
        ),
        ("fuzzy recall", "fuzzy_recall", {"motif_len": 2}, letters + values, key_value),
        ("selective copy", "selective_copy", {"n_copied": 6}, [*"ABCDEF", "·", "▷"], signs),
        ("compression", "compression", {"seq_len": 23}, [*"ABCDEF", "|", "▷"], {6: red, 7: red}),
        (
            "memorisation",
            "memorization",
            {"vocab_size": 9},
            [*letters, *values, "?"],
            key_value | {8: red},
        ),
    ):
        data = MADDataModule(task, **{"vocab_size": 8, "seq_len": 24, **small, **options})  # type: ignore[arg-type]
        found.append((title, data.generator(1).batch_at(0), symbols, colours))
    return found


def draw_tasks() -> str:
    """The picture of the synthetic tasks: a row of each, what is asked under it."""
    label, cell, high = 150, 27, 74
    rows = task_rows()
    width, height = label + 24 * cell + 2 * MARGIN, 40 + high * len(rows)
    shapes = [
        f'<text x="{MARGIN}" y="24" font-size="14" font-weight="bold" fill="#222">One row of each task; '
        "under it, what is to be predicted there</text>"
    ]
    for number, (title, batch, names, colours) in enumerate(rows):
        y = 46 + high * number
        shapes.append(f'<text x="{MARGIN}" y="{y + 18}" font-size="13" fill="#222">{title}</text>')
        for place, token in enumerate(batch.tokens[0].tolist()):
            x, colour = MARGIN + label + place * cell, colours.get(token, "#0b7285")
            asked = bool(batch.loss_mask[0, place])
            shapes.append(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="26" rx="3" fill="{colour}" '
                f'fill-opacity="{0.3 if asked else 0.1}"/><text x="{x + cell / 2 - 1}" y="{y + 18}" '
                f'font-size="13" text-anchor="middle" fill="{colour}">{escape(names[token])}</text>'
            )
            if asked:
                target = escape(names[int(batch.targets[0, place])])
                shapes.append(
                    f'<text x="{x + cell / 2 - 1}" y="{y + 44}" font-size="13" font-weight="bold" '
                    f'text-anchor="middle" fill="#222">{target}</text>'
                )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="ui-monospace, Menlo, Consolas, monospace">\n'
        "<title>One row of each synthetic task</title>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def main() -> None:
    """Write all pictures."""
    for setting in ("in_weight", "in_tool"):
        write_text(ASSETS / f"dialogue_{setting}.svg", draw(setting))
    write_text(ASSETS / "masks.svg", draw_masks())
    write_text(ASSETS / "synthetic_tasks.svg", draw_tasks())


if __name__ == "__main__":
    main()
