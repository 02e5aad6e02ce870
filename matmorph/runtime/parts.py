"""The encoder or the decoder of a folder whose model has both, each as a model of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from matmorph.runtime.errors import ArtifactError
from matmorph.runtime.format.artifact import Manifest

PartName: TypeAlias = Literal["encoder", "decoder"]


def part_of(manifest: Manifest, part: PartName, where: str) -> tuple[Manifest, str]:
    """(what the manifest says of the part alone, the part's file). The cache is the decoder's. Raises ArtifactError for a model in one
    piece."""
    if manifest.parts is None:
        raise ArtifactError(
            f"{where}: the model is in one piece; one with an encoder that is compiled with its cache has an encoder and a decoder"
        )
    found = manifest.parts.encoder if part == "encoder" else manifest.parts.decoder
    cache = manifest.cache if part == "decoder" else None
    return replace(manifest, inputs=found.inputs, outputs=found.outputs, cache=cache, parts=None), found.model
