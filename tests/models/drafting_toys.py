"""Small bases for the models that draft, and rows for them."""

import torch

from toolmem.models import Eagle, Medusa

VOCAB, DIM = 20, 16
KINDS = {"medusa": Medusa, "eagle": Eagle}
BASES = {
    "transformer": {
        "class_path": "toolmem.models.Transformer",
        "init_args": {"dim": DIM, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    },
    "softcap": {
        "class_path": "toolmem.models.Transformer",
        "init_args": {
            "dim": DIM, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "position": "learned",
            "logit_softcap": 5.0, "tie_embeddings": True, "embedding_scale": True,
        },
    },
    "mamba2": {
        "class_path": "toolmem.models.Mamba2",
        "init_args": {"dim": DIM, "n_layers": 1, "state_dim": 4, "head_dim": 8, "max_seq_len": 64},
    },
    "moe": {
        "class_path": "toolmem.models.MoETransformer",
        "init_args": {
            "dim": DIM, "n_layers": 1, "n_heads": 2, "n_experts": 4, "top_k": 2, "hidden_dim": 16,
            "max_seq_len": 64,
        },
    },
}  # fmt: skip


class NoModel:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def make(kind, base="transformer", seed=0, **options):
    """A model that drafts, all of its parameters moved from their first values."""
    torch.manual_seed(seed)
    model = KINDS[kind](VOCAB, BASES[base], **options)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.startswith("multi_token."):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def rows(batch=2, seq=11, seed=1, share=0.6):
    """Tokens, targets and where they bear loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (batch, seq + 1), generator=generator)
    mask = torch.rand((batch, seq), generator=generator) < share
    return x[:, :-1], x[:, 1:], mask
