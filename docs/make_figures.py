"""Draws the concept pictures: one dialogue of each setting, token by token, as SVG.

    python docs/make_figures.py            writes docs/assets/dialogue_*.svg

The tokens, roles and loss are those of the library's own encoder, so the pictures cannot drift from it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from toolmem.data import ByteTokenizer, TemplateSet, encode_dialogue, make_population
from toolmem.files import write_text

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


def main() -> None:
    """Write both pictures."""
    for setting in ("in_weight", "in_tool"):
        write_text(ASSETS / f"dialogue_{setting}.svg", draw(setting))


if __name__ == "__main__":
    main()
