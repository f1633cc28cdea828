"""The base model, built from its verified files alone (`privet.client.bases`).

Nothing in a base directory is ever executed: no pickle, no remote code.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from privet.client.training.architecture import load_text_model
from privet.client.training.packing import Layout, within_records
from privet.client.training.quantised import load_quantised
from privet.common.errors import StudyError
from privet.common.study.sections import Quantisation, TaskSection


class HeadModel(nn.Module):
    """A pretrained backbone with a linear classifier on its last hidden states.

    With `pooling`, the token vectors of a record become one vector of root mean square 1 (from the mean over tokens,
    the first token, or the last one), and the record gets one row of logits; without, each token gets one.
    The classifier starts at zero, so that every site starts from the same function.

    With `all_layers`, the classifier reads a token's vectors of all layers and of the embeddings, one after the other
    (Devlin et al. 2019, https://aclanthology.org/N19-1423, section 5.3): a sentence encoder's last layer keeps little
    of a single word.

    With `head`, the record's vector is not normalised: the last token's goes to a classifier without bias, as the
    library's decoders do it, and the first token's through the base's own frozen pooler, as BERT does it.
    """

    base_model_prefix = "backbone"  # where libraries look for the pretrained part
    pooler_weight: torch.Tensor
    pooler_bias: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        pooling: str | None,
        head: str | None = None,
        pooler: Any = None,
        *,
        all_layers: bool = False,
    ) -> None:
        super().__init__()
        self.config = backbone.config
        self.all_layers = all_layers
        self.backbone = backbone
        self.pooling = pooling
        self.head = head
        if pooler is not None:
            # Buffers, and no layer: no name of a study's can give it an adapter.
            self.register_buffer("pooler_weight", pooler.dense.weight.detach())
            self.register_buffer("pooler_bias", pooler.dense.bias.detach())
        bias = head is None or pooling != "last"
        width = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if all_layers:
            width *= 1 + int(backbone.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        self.classifier = nn.Linear(width, classes, bias=bias)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Layout | None = None,
        **where: torch.Tensor,
    ) -> torch.Tensor:
        """Return logits.

        Args:
            input_ids: Tokens: padded records [n, t], or a pass [1, rows].
            attention_mask: 1 at tokens, [n, t]; None for a packed pass.
            layout: Where the records of a pass lie. A record's logits are then those at its first row.
            where: What else the backbone takes, such as `position_ids`.

        Returns:
            Logits [n, classes] with pooling, and [n, t, classes] without; [1, rows, classes] of a pass.
        """
        # A packed pass has no mask: its attention takes the layout.
        if layout is not None and attention_mask is None:
            where["layout"] = layout  # type: ignore[assignment]
        if self.all_layers:
            where["output_hidden_states"] = True  # type: ignore[assignment]
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **where)
        hidden: torch.Tensor = self._all_layers(output) if self.all_layers else output.last_hidden_state
        if self.pooling is None:
            return self.classifier(hidden)  # type: ignore[no-any-return]
        if layout is None:
            ends = torch.ones_like(input_ids).sum(1) if attention_mask is None else attention_mask.sum(1)
            pooled = [self._pooled(row[:end]) for row, end in zip(hidden, ends.tolist(), strict=True)]
            return self.classifier(torch.stack(pooled))  # type: ignore[no-any-return]
        with within_records():
            # Taken apart at once: as a slice, each record would cost autograd a tensor of all rows.
            records = layout.records(hidden.squeeze(0))
            together = torch.stack([self._pooled(vectors) for vectors in records])
            # At the record's first row, so that the classifier works on rows of the pass as every other layer does.
            first = torch.tensor([start for start, _ in layout.spans], device=hidden.device)
            rows = together.new_zeros(layout.rows, hidden.shape[-1]).index_copy(0, first, together)
        return self.classifier(rows.unsqueeze(0))  # type: ignore[no-any-return]

    def _all_layers(self, output: Any) -> torch.Tensor:
        """Return the vectors of the embeddings and of all layers, one after the other, [n, t, width]."""
        found = getattr(output, "hidden_states", None) or ()
        if sum(each.shape[-1] for each in found) != self.classifier.in_features:
            raise StudyError(
                f"task.head_reads: a base of the family {getattr(self.config, 'model_type', 'unknown')} does not give "
                "the outputs of all its layers",
                "remove task.head_reads from the study",
            )
        return torch.cat(found, -1)

    def _pooled(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return one vector [h] for a record's token vectors [t, h]: no other record takes part."""
        if self.pooling == "mean":
            pooled = vectors.float().mean(0)
        else:
            pooled = vectors[0 if self.pooling == "cls" else -1].float()
        if self.head is not None:
            if self.pooling == "cls":
                pooled = nn.functional.linear(pooled.unsqueeze(0), self.pooler_weight, self.pooler_bias)[0].tanh()
            return pooled.float()
        scaled: torch.Tensor = nn.functional.normalize(pooled, dim=-1) * vectors.shape[-1] ** 0.5
        return scaled


def build_base(
    base: Path,
    task: TaskSection,
    dropout: float,
    attention: str,
    dtype: torch.dtype,
    quantised: tuple[Quantisation, str] | None = None,
) -> nn.Module:
    """Load a verified base for a task, in evaluation mode, on the CPU.

    Args:
        base: The base's directory.
        task: The task.
        dropout: Rate of every dropout.
        attention: Attention to use where the family offers it: "sdpa" or "eager".
        dtype: Of the weights that are not quantised.
        quantised: Number format of quantised layers, and the digest that they must have.

    Raises:
        StudyError: The base is of a kind that cannot be trained or quantised, or lacks weights that the task needs:
            they would be random, and different at every site.
        VerificationError: The quantised layers have another digest.
    """
    if quantised is None:
        loaded, missing = load_text_model(base, task.kind, dropout, attention, dtype)
    else:
        loaded, missing = load_quantised(base, task.kind, dropout, attention, dtype, *quantised)
    # An encoder's pooler is used by the library's head alone, and many bases have none. It is removed below, so that
    # none is computed.
    needed = task.head is not None and task.pooling == "cls"
    if missing := [name for name in missing if needed or "pooler" not in name]:
        raise StudyError(
            f"model.base: the model {base.name} lacks {len(missing)} weight tensors that {task.kind} needs, "
            f"for example {missing[0]}",
            "choose a base that was trained for this kind of task",
        )
    if task.generates:
        return loaded
    pooler = _library_pooler(loaded, task) if task.head is not None else None
    if hasattr(loaded, "pooler"):
        loaded.pooler = None  # type: ignore[assignment]
    pooling = task.pooling if task.kind == "text-classification" else None
    every_layer = task.head_reads is not None
    return HeadModel(loaded, len(task.labels), pooling, task.head, pooler, all_layers=every_layer)


def _library_pooler(base: nn.Module, task: TaskSection) -> Any:
    """Return the pooler that the library's classifier applies to a base; None where it applies none.

    Raises:
        StudyError: The library's classifier of this family computes something else.
    """
    config = copy.deepcopy(base.config)
    family = getattr(config, "model_type", "unknown")
    if task.pooling == "cls" and family == "bert":
        return base.pooler
    if task.pooling == "last":
        try:
            with torch.device("meta"):
                score = getattr(AutoModelForSequenceClassification.from_config(config), "score", None)
        except ValueError:  # the library has no such classifier
            score = None
        if isinstance(score, nn.Linear) and score.bias is None:
            return None
    raise StudyError(
        f"task.head: the library's classifier of the family {family} does not compute what pooling {task.pooling} does",
        'set task.pooling to "cls" for BERT or to "last" for a decoder, or remove task.head from the study',
    )
