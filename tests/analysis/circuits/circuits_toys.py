"""A Transformer of two layers whose weights are set by hand: a previous-token head, an induction head.

The stream has four parts: the token, its position, what head 0.0 writes (the token before), and what head
1.0 writes (the token to come), which is all that the output head reads.

    0.0   query: the position before; key: the position; value: the token        -> part `before`
    1.0   query: the token; key: part `before`; value: the token                 -> part `says`

So at the second A of ``A B ... A`` head 1.0 looks at the token whose `before` is A, which is B, and says
B. Heads 0.1 and 1.1 and the feed-forwards are left at work, but write next to nothing.
"""

from __future__ import annotations

import torch

from toolmem.models import Transformer

VOCAB, LENGTH = 20, 24
TOKEN, POSITION, BEFORE, SAYS = (
    slice(0, VOCAB),
    slice(VOCAB, VOCAB + LENGTH),
    slice(VOCAB + LENGTH, 2 * VOCAB + LENGTH),
    slice(2 * VOCAB + LENGTH, 3 * VOCAB + LENGTH),
)
DIM, HEAD = 3 * VOCAB + LENGTH, LENGTH
SHARP = 2.6  # attention's scores come to 40 and more


def induction(**options) -> Transformer:
    """The model, in float64 and evaluation mode."""
    torch.manual_seed(0)
    model = Transformer(
        VOCAB, DIM, n_layers=2, n_heads=2, head_dim=HEAD, hidden_dim=6, max_seq_len=LENGTH,
        position="learned", feed_forward="gelu", **options,
    )  # fmt: skip
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1e-4)
        model.embedding.weight.zero_()[:, TOKEN] = torch.eye(VOCAB, dtype=torch.float64)
        model.position_embedding.weight.zero_()[:, POSITION] = torch.eye(LENGTH).double()
        for layer in (0, 1):
            mixer = model.blocks[layer].mixer
            query, key, value = mixer.qkv.weight.view(3, 2, HEAD, DIM)[:, 0]
            out = mixer.out.weight[:, :HEAD]
            places = torch.arange(LENGTH)
            if layer == 0:
                query[places[:-1], POSITION.start + places[1:]] = SHARP
                key[places, POSITION.start + places] = SHARP
            else:
                symbols = torch.arange(VOCAB)
                query[symbols, TOKEN.start + symbols] = SHARP
                key[symbols, BEFORE.start + symbols] = SHARP
                # the first token has none before it, and head 0.0 takes itself for that
                key[symbols, POSITION.start] = -SHARP
            symbols = torch.arange(VOCAB)
            value[symbols, TOKEN.start + symbols] = 1.0
            out[(BEFORE if layer == 0 else SAYS).start + symbols, symbols] = 1.0
        model.head.weight.zero_()[:, SAYS] = 20 * torch.eye(VOCAB, dtype=torch.float64)
    return model


def repeats(n: int = 8, length: int = 10, seed: int = 1) -> torch.Tensor:
    """Rows of different tokens, told twice: (n, 2 * length)."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([torch.randperm(VOCAB, generator=generator)[:length] for _ in range(n)])
    return once.repeat(1, 2)
