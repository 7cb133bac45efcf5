"""Save a trained model in Hugging Face format: bf16 weights, configs and the tokenizer."""

import json
import os
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from testbed import tokenizer
from testbed.model import Llama

MODELS: Final = Path(__file__).parent / "models"


def export(model: Llama, folder: Path | None = None) -> Path:
    """Write `model` below testbed/models (or to `folder`); a crash leaves the old weights or the new, never half."""
    folder = folder or MODELS / model.shape.name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").chmod(0o644)
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
    write_json(folder / "config.json", model.shape.to_hf_config())
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.BOS_ID,
            "eos_token_id": tokenizer.EOS_ID,
            "pad_token_id": tokenizer.PAD_ID,
            "do_sample": False,
        },
    )
    tokenizer.build().save_pretrained(folder)
    # transformers 5 writes its own class name there; this one is known to transformers 4 as well.
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer_config.pop("backend", None)
    write_json(folder / "tokenizer_config.json", tokenizer_config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def write_json(path: Path, content: object) -> None:
    """Write readable JSON that ends with a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
