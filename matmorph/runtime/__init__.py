"""Running artefacts: numpy, onnxruntime and safetensors only, so that a machine that deploys needs no torch.

    from matmorph.runtime import Session
    outputs = Session("out/").run({"input_ids": ids, "attention_mask": mask})

`python -m matmorph.runtime.check DIR` checks a folder's files and its outputs on this machine.
"""

from matmorph.runtime.errors import ArtifactError, ExecutionError, InputMismatch, ProviderError, SessionError
from matmorph.runtime.manifest import TensorInfo
from matmorph.runtime.session import Session

__all__ = ["ArtifactError", "ExecutionError", "InputMismatch", "ProviderError", "Session", "SessionError", "TensorInfo"]
