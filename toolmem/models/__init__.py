"""Architectures: plain ``nn.Module``s that know nothing of Lightning, tokenizers or files."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LanguageModel": "toolmem.models.language_model",
        "Transformer": "toolmem.models.transformer",
        "MoETransformer": "toolmem.models.moe",
        "Mamba": "toolmem.models.mamba",
        "Mamba2": "toolmem.models.mamba2",
        "RNN": "toolmem.models.rnn",
        "LinearAttention": "toolmem.models.linear_attention",
        "Hybrid": "toolmem.models.hybrid",
        "Medusa": "toolmem.models.medusa",
        "Eagle": "toolmem.models.eagle",
        "Cache": "toolmem.models.cache",
        "LoRA": "toolmem.models.lora",
    },
)
