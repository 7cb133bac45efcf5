"""Models of a real size without their weights: Llama-3.1-8B's shape, made here, for engines with dummy weights.

The configuration and the tokenizer are our own: a word per token id, so that any ids can be sent and read back. What
such a model answers means nothing; how long it takes and what it draws is what a trained one of its shape would.
"""

from __future__ import annotations

import json
from pathlib import Path

LLAMA_8B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "torch_dtype": "float16",
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2_048,
    "intermediate_size": 8_192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""The draft model of the paper's speculation (Llama-3.2-1B)."""
W8A8: dict[str, object] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
            "output_activations": None,
        }
    },
}  # fmt: skip
GPTQ: dict[str, object] = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
}  # fmt: skip


def make_all(folder: Path) -> None:
    """Write the four model folders below `folder`, unless they are there."""
    make(folder / "fp16", LLAMA_8B)
    make(folder / "int8", LLAMA_8B | {"quantization_config": W8A8})
    make(folder / "gptq", LLAMA_8B | {"quantization_config": GPTQ})
    make(folder / "draft", LLAMA_1B)


def make(folder: Path, config: dict[str, object]) -> None:
    """One model folder in Hugging Face format, without weights."""
    if (folder / "tokenizer.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    words = int(str(config["vocab_size"]))
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(words)}, "unk_token": "w0"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "w128000",
        "eos_token": "w128001",
        "unk_token": "w0",
        "model_max_length": 8_192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # Last: its presence says that the folder is complete.
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
