"""Texts of all sorts, for tokenizers."""

import random

SENTENCES = """
the fox runs, don't WE'LL 12 345 6789 3.14 f(x) = x**2 ünïcödé Ωμέγα 漢字かな 한국어 العربية हिन्दी 🙂🏽
<|im_start|>user<|im_end|> </s> <unk> <|endoftext|> _under_score camelCase http://a.b/c?d=e&f=g #tag @me
def g(): return {'a': [1, 2]} // /* */ <p> &amp; \\n %d 1,000,000 2026-11-28 +44(0)20 €5 naïve
"""
WORDS = SENTENCES.split()
GAPS = [
    " ", "  ", "   ", "    ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u2028", "\u200d",
    "\ufeff", "e\u0301", "0", "00", "👩\u200d👩\u200d👧",
]  # fmt: skip
PIECES = [*WORDS, *GAPS]


def strings(n: int, seed: int = 0) -> list[str]:
    """Words of many scripts, digits, white space, code, emoji, special tokens as text; any letters at all."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        if i % 4 == 3:
            found.append("".join(chr(_letter(draw)) for _ in range(draw.randrange(12))))
        else:
            joint = draw.choice(["", " ", " "])
            found.append(joint.join(draw.choice(PIECES) for _ in range(draw.randrange(1, 14))))
    return found


def _letter(draw: random.Random) -> int:
    while True:
        code = draw.choice([draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x20000)])
        if not 0xD800 <= code < 0xE000:
            return code
