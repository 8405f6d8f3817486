"""Multi-token prediction: in training each position also predicts tokens beyond the next.

Two forms. ``sequential`` is DeepSeek-V3's (arXiv 2412.19437, section 2.2): module k joins what module
k - 1 left with the embedding of the token k places on, so that it knows all that comes before the
token it predicts:

    h^k_i = Block_k(M_k [norm(h^{k-1}_i) ; norm(Emb(t_{i+k}))])       h^0: the model's own output
    P(t_{i+k+1}) = softmax(Head(norm(h^k_i)))

``parallel`` is that of arXiv 2404.19737: head k is a block on the model's own output, which must
guess without having seen the tokens between.

Embedding and head are the model's. Generation uses none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models.context import Extras
    from toolmem.models.language_model import LanguageModel

MultiTokenForm = Literal["sequential", "parallel"]


class MultiToken(nn.Module):
    """Modules that predict the tokens 2, 3, ... places on.

    Args:
        make_block: makes one block of the architecture's own kind.
        make_norm: makes one norm.
        dim: width of the residual stream.
        n_tokens: tokens beyond the next: modules.
        form: ``sequential`` or ``parallel``.
        weight: of their mean loss beside the next token's.

    Raises:
        ToolmemError: for options outside their range, by name.
    """

    parameter_group = "multi_token"
    whole_group = True

    def __init__(
        self,
        make_block: Callable[[], nn.Module],
        make_norm: Callable[[], nn.Module],
        dim: int,
        n_tokens: int,
        form: MultiTokenForm = "sequential",
        weight: float = 0.3,
    ) -> None:
        super().__init__()
        if form not in ("sequential", "parallel"):
            raise ToolmemError(f"multi_token_form: unknown {form!r}; choose sequential or parallel")
        if n_tokens < 1 or weight <= 0:
            raise ToolmemError("multi_token must be 1 or more, multi_token_weight above 0")
        self.form = form
        self.weight = weight
        self.blocks = nn.ModuleList(make_block() for _ in range(n_tokens))
        self.norms = nn.ModuleList(make_norm() for _ in range(n_tokens))
        joined = n_tokens if form == "sequential" else 0
        self.state_norms = nn.ModuleList(make_norm() for _ in range(joined))
        self.token_norms = nn.ModuleList(make_norm() for _ in range(joined))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(joined))

    def inactive_parameters(self) -> int:
        """All of them: no token that is generated uses one."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(
        self, model: LanguageModel, states: Tensor, tokens: Tensor, documents: Tensor | None = None
    ) -> list[Tensor]:
        """What the head reads to predict the token k + 1 places on, for k = 1, 2, ...

        Attention in here is causal also in a model of ``attention_mask: prefix``: a position of a span
        that saw the span's end would see, with it, the embedding of the token that it is to predict.

        Args:
            model: whose embedding and positions are used.
            states: (b, s, dim), what the model's head reads.
            tokens: (b, s) int64.
            documents: (b, s) ids, or None.

        Returns:
            tensors (b, s - k, dim), k from 1; fewer than there are modules where rows are short.
        """
        found = []
        for index, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            length = tokens.shape[1] - 1 - index
            if length < 1:
                break
            of_rows = None if documents is None else documents[:, :length]
            context = model.context(tokens[:, :length], of_rows, None)
            x = states[:, :length]
            if self.form == "sequential":
                ahead = model.embed(tokens[:, 1 + index :])
                pair = (self.state_norms[index](x), self.token_norms[index](ahead))
                states = block(self.joins[index](torch.cat(pair, dim=-1)), context)
                found.append(norm(states))
            else:
                found.append(norm(block(x, context)))
        return found

    def bearing(self, loss_mask: Tensor, documents: Tensor | None, ahead: int) -> Tensor:
        """Where the prediction of the token ``ahead`` + 1 places on bears loss, (b, s - ahead) bool.

        Where that token bears loss and is of the same document. The parallel form has not seen the
        tokens between, so those must be the model's own too: it cannot know what others will say.
        """
        length = loss_mask.shape[1] - ahead
        bears = loss_mask[:, ahead:]
        if self.form == "parallel":
            for between in range(ahead):
                bears = bears & loss_mask[:, between : between + length]
        if documents is not None:
            bears = bears & (documents[:, ahead:] == documents[:, :length])
        return bears

    def add_losses(
        self,
        model: LanguageModel,
        extras: Extras,
        states: Tensor,
        tokens: Tensor,
        targets: Tensor,
        loss_mask: Tensor,
        documents: Tensor | None = None,
    ) -> None:
        """Add ``multi_token/loss``: the weight times the modules' mean loss, in nats a token.

        A module's loss is summed over the tokens that it predicts and divided by the number of tokens
        that bear the model's own loss, as in DeepSeek-V3; it is logged as ``multi_token/loss_K`` for
        the token K places on.

        Args:
            model: the model that this belongs to.
            extras: takes the loss and the figures.
            states: (b, s, dim), what the model's head reads.
            tokens: (b, s) int64.
            targets: (b, s) int64, the token after each.
            loss_mask: (b, s) bool, where the target bears loss.
            documents: (b, s) ids, or None.
        """
        count = loss_mask.sum().clamp(min=1)
        total = states.new_zeros((), dtype=torch.float32)
        hidden = self.hidden(model, states, tokens, documents)
        for ahead, predicted in enumerate(hidden, start=1):
            places = self.bearing(loss_mask, documents, ahead).flatten().nonzero().squeeze(1)
            logits = model.logits(predicted.flatten(0, 1).index_select(0, places))
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            wanted = targets[:, ahead:].flatten().index_select(0, places)
            loss = F.cross_entropy(logits, wanted, reduction="sum") / count
            extras.metrics[f"multi_token/loss_{ahead + 1}"] = loss.detach()
            total = total + loss
        extras.add_loss("multi_token/loss", self.weight / len(self.blocks) * total)
