"""Keep the input embeddings in the host's memory: a look-up moves a few rows of a table of a gigabyte."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """An embedding whose table is on the CPU and whose rows come out where the ids are."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table.cpu()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.table.weight  # type: ignore[assignment]
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids.cpu())
        return rows.to(ids.device, non_blocking=True)


def keep_embeddings_on_host(model: Any, *, shared: bool = False) -> str:
    """Move the input embeddings to the host; where the output head uses the same table, only if it may: `shared`.

    Returns what was done.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight and not shared:
        return "the output head shares the embeddings' table: it stays on the device"
    model.set_input_embeddings(HostEmbedding(embeddings))
    return "the input embeddings stay in the host's memory"
