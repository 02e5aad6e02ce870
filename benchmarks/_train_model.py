"""The model of train_step.py and its step under torch: in a file of their own, so that another process can load a saved module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], object]


class Classifier(nn.Module):
    """BERT, the first or the mean token, and a linear head."""

    def __init__(self, head: str, sizes: Mapping[str, int]) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier, self.mean = nn.Linear(config.hidden_size, 2), head == "mean"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if not self.mean:
            return {"logits": self.classifier(hidden[:, 0])}
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return {"logits": self.classifier((hidden * mask).sum(1) / mask.sum(1))}


SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}


def torch_step(module: nn.Module, batch: Mapping[str, Any], threads: int, compiled: bool = False) -> Step:
    """A step of AdamW on what of the module requires a gradient."""
    torch.set_num_threads(threads)
    feeds = {name: torch.as_tensor(array) for name, array in batch.items()}
    labels = feeds.pop("labels")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)
    run = torch.compile(module) if compiled else module

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(run(**feeds)["logits"], labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
