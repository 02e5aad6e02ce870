"""A Hugging Face folder through the command line: inspect, plan, compile, verify.

Without an argument it writes a small random BERT first, so that nothing is downloaded: python examples/hf_folder.py [FOLDER]
"""

import sys
from pathlib import Path

from matmorph.cli.main import main as command

SPEC = """\
version: 1
name: half-mlp
rules:
  - name: mlp
    match: {role: "mlp.*"}
    rewrite: {low_rank: {rank: {ratio: 0.5}}}
  - name: attention
    match: {role: "attention.*"}
    rewrite: {quantize: {quantizer: uniform, bits: 4, block_size: 16}}
"""


def small_bert(folder: Path) -> Path:
    """A BERT of two layers with random weights, as `save_pretrained` writes any model."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    BertModel(config).save_pretrained(folder)
    return folder


def matmorph(*words: str) -> None:
    """What the command line does with these words; ends where they fail."""
    print("$ matmorph", *words, flush=True)
    try:
        command(words)
    except SystemExit as done:
        if done.code:
            raise


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else small_bert(Path("small-bert"))
    Path("half-mlp.yaml").write_text(SPEC, encoding="utf-8")
    matmorph("inspect", str(model))
    matmorph("plan", str(model), "--spec", "half-mlp.yaml")
    matmorph("compile", str(model), "--spec", "half-mlp.yaml", "--out", "out-bert", "--force")
    matmorph("verify", "out-bert")


if __name__ == "__main__":
    main()
