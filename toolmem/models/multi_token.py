"""Multi-token prediction: in training each position also predicts tokens beyond the next.

``TokensAhead`` is what all such modules share, those of ``medusa.py`` and ``eagle.py`` among them;
``MultiToken`` is the kind that a model is trained with from the start, in one of two forms.
``sequential`` is DeepSeek-V3's (arXiv 2412.19437, section 2.2): module k joins what module k - 1 left
with the embedding of the token k places on, so that it knows all that comes before the token it
predicts:

    h^k_i = Block_k(M_k [norm(h^{k-1}_i) ; norm(Emb(t_{i+k}))])       h^0: the model's own output
    P(t_{i+k+1}) = softmax(Head(norm(h^k_i)))

``parallel`` is that of arXiv 2404.19737: head k is a block on the model's own output, which must
guess without having seen the tokens between.

Embedding and head are the model's. Generation uses none of it, unless it drafts (``drafting.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models.context import Extras
    from toolmem.models.language_model import LanguageModel

MultiTokenForm = Literal["sequential", "parallel"]


class TokensAhead(nn.Module):
    """Modules that predict tokens beyond the next from what a model's head reads.

    A subclass puts one module for each token ahead into ``blocks`` and says what they compute
    (``hidden``) and, where it is not the cross-entropy by the model's own head, lose (``losses``).

    Args:
        name: of its parameters' group and of its figures.
        form: ``sequential`` modules have seen the tokens before the one that they predict, ``parallel``
            ones only those that the model has.
        weights: of each module's loss beside the next token's, by how far it looks.
    """

    whole_group = True
    blocks: nn.ModuleList

    def __init__(self, name: str, form: MultiTokenForm, weights: Sequence[float]) -> None:
        super().__init__()
        self.parameter_group = name
        self.form = form
        self.weights = list(weights)

    def inactive_parameters(self) -> int:
        """All of them: no token that is generated one by one uses one."""
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
        raise NotImplementedError

    def losses(
        self, model: LanguageModel, ahead: int, predicted: Tensor, truth: Tensor, wanted: Tensor
    ) -> Tensor:
        """A module's loss, summed over places: here the cross-entropy by the model's head, in nats.

        Args:
            model: the model that this belongs to.
            ahead: k, from 1.
            predicted: (n, dim), of ``hidden``.
            truth: (n, dim), what the model's head reads k places on.
            wanted: (n,) int64, the tokens k + 1 places on.
        """
        return F.cross_entropy(wide(model.logits(predicted)), wanted, reduction="sum")

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
        """Add ``NAME/loss``: the modules' losses, weighted and summed.

        A module's loss is summed over the tokens that it predicts and divided by the number of tokens
        that bear the model's own loss, as in DeepSeek-V3; it is logged as ``NAME/loss_K`` for the token
        K places on.

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
        for ahead, (predicted, weight) in enumerate(
            zip(hidden, self.weights, strict=False), start=1
        ):
            places = self.bearing(loss_mask, documents, ahead).flatten().nonzero().squeeze(1)
            at_places = (
                predicted.flatten(0, 1).index_select(0, places),
                states[:, ahead:].flatten(0, 1).index_select(0, places),
                targets[:, ahead:].flatten().index_select(0, places),
            )
            loss = self.losses(model, ahead, *at_places) / count
            extras.metrics[f"{self.parameter_group}/loss_{ahead + 1}"] = loss.detach()
            total = total + weight * loss
        extras.add_loss(f"{self.parameter_group}/loss", total)


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class MultiToken(TokensAhead):
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

    def __init__(
        self,
        make_block: Callable[[], nn.Module],
        make_norm: Callable[[], nn.Module],
        dim: int,
        n_tokens: int,
        form: MultiTokenForm = "sequential",
        weight: float = 0.3,
    ) -> None:
        if form not in ("sequential", "parallel"):
            raise ToolmemError(f"multi_token_form: unknown {form!r}; choose sequential or parallel")
        if n_tokens < 1 or weight <= 0:
            raise ToolmemError("multi_token must be 1 or more, multi_token_weight above 0")
        super().__init__("multi_token", form, [weight / n_tokens] * n_tokens)
        self.blocks = nn.ModuleList(make_block() for _ in range(n_tokens))
        self.norms = nn.ModuleList(make_norm() for _ in range(n_tokens))
        joined = n_tokens if form == "sequential" else 0
        self.state_norms = nn.ModuleList(make_norm() for _ in range(joined))
        self.token_norms = nn.ModuleList(make_norm() for _ in range(joined))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(joined))

    def hidden(
        self, model: LanguageModel, states: Tensor, tokens: Tensor, documents: Tensor | None = None
    ) -> list[Tensor]:
        """As the module's page says it; arguments as ``TokensAhead.hidden``."""
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
