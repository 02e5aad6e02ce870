"""Running and training artefacts: numpy, onnxruntime and safetensors only, so that a machine that deploys needs no torch.

    from matmorph.runtime import Session
    outputs = Session("out/").run({"input_ids": ids, "attention_mask": mask})

    from matmorph.runtime import Generator
    tokens = Generator("out-decoder/").generate([[1, 2, 3]], max_new_tokens=32)

    from matmorph.runtime import Trainer, linear, load_batches
    trainer = Trainer("out-train/", lr=1e-4)
    trainer.fit(load_batches("train.npz", 16), epochs=3, schedule=linear(warmup=0.06), checkpoint="run.safetensors")

`python -m matmorph.runtime.check DIR` checks a folder's files and its outputs on this machine. Every name is imported on first use:
who reads `matmorph.runtime.targets` or `matmorph.runtime.format` needs no ONNX Runtime, and who runs a model loads nothing of training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from matmorph.runtime.errors import (
    AdapterError,
    ArtifactError,
    CheckpointError,
    ExecutionError,
    InputMismatch,
    ProviderError,
    SessionError,
    TrainingError,
)

if TYPE_CHECKING:
    from matmorph.runtime.batches import Batches, load_batches, trim_padding
    from matmorph.runtime.decoding import PromptCache
    from matmorph.runtime.evolution import SearchResult, SearchSettings, search
    from matmorph.runtime.fitting import StepInfo
    from matmorph.runtime.format.artifact import TensorInfo
    from matmorph.runtime.generator import Generator
    from matmorph.runtime.labelled import labelled_loss
    from matmorph.runtime.schedules import constant, cosine, linear
    from matmorph.runtime.seq2seq_generator import Seq2SeqGenerator
    from matmorph.runtime.session import Session
    from matmorph.runtime.text_score import perplexity
    from matmorph.runtime.trainer import Trainer

__all__ = [
    "AdapterError",
    "ArtifactError",
    "Batches",
    "CheckpointError",
    "ExecutionError",
    "Generator",
    "InputMismatch",
    "PromptCache",
    "ProviderError",
    "SearchResult",
    "SearchSettings",
    "Seq2SeqGenerator",
    "Session",
    "SessionError",
    "StepInfo",
    "TensorInfo",
    "Trainer",
    "TrainingError",
    "constant",
    "cosine",
    "labelled_loss",
    "linear",
    "load_batches",
    "perplexity",
    "search",
    "trim_padding",
]

_HOMES = {
    "TensorInfo": "format.artifact",
    "Batches": "batches",
    "load_batches": "batches",
    "trim_padding": "batches",
    "StepInfo": "fitting",
    "Generator": "generator",
    "PromptCache": "decoding",
    "Seq2SeqGenerator": "seq2seq_generator",
    "labelled_loss": "labelled",
    "perplexity": "text_score",
    "constant": "schedules",
    "cosine": "schedules",
    "linear": "schedules",
    "search": "evolution",
    "SearchResult": "evolution",
    "SearchSettings": "evolution",
    "Session": "session",
    "Trainer": "trainer",
}
"""Module by the public name that it holds."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'matmorph.runtime' has no attribute {name!r}")
    return getattr(import_module(f"matmorph.runtime.{_HOMES[name]}"), name)
