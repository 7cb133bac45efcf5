"""A Llama decoder small enough to read, with the parameter names of transformers' LlamaForCausalLM.

Training uses it because packed rows need a block-diagonal mask and because it costs less per step on a CPU; the saved
weights load into transformers and vLLM unchanged (`tests/unit/test_testbed.py` compares the logits).
"""

from typing import Final

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.tokenizer import BOS_ID, EOS_ID, MAX_POSITIONS, PAD_ID, VOCABULARY_SIZE

ROPE_THETA: Final = 10_000.0
NORM_EPS: Final = 1e-5


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of one model. Multiples of 128 (and heads of 32) suit every kernel that a test may choose."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    """May be more than `hidden / head_dim`: more heads find the lookup of `get` sooner."""
    head_dim: int = 32

    def to_hf_config(self) -> dict[str, object]:
        """Return `config.json` as transformers and vLLM read it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "dtype": "bfloat16",
        }


SHAPES: Final = {
    "tiny-small": Shape(name="tiny-small", num_layers=4, hidden=128, intermediate=256, num_heads=8),
    "tiny-large": Shape(name="tiny-large", num_layers=5, hidden=256, intermediate=512, num_heads=8),
}


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [batch, 1, time, head_dim], for positions [batch, time]."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [batch, heads, time, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), NORM_EPS)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width = shape.num_heads * shape.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(shape.hidden, width, bias=False))
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, key, value = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        query, key = rotate(query, cos, sin).to(value.dtype), rotate(key, cos, sin).to(value.dtype)
        # Plain softmax: the backward pass of scaled_dot_product_attention is five times slower on a CPU at these sizes.
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype) @ value
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden)


class Llama(nn.Module):
    """The whole model; matrices start at the scale of their input width, residual outputs are scaled by depth too."""

    def __init__(self, shape: Shape, embedding_std: float = 0.02) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, VOCABULARY_SIZE, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * shape.num_layers) ** -0.5 if is_residual else 1.0
                std = embedding_std if "embed" in name else 0.7 * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=scale * std)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """Return logits [batch, time, vocabulary], or [len(at), vocabulary] at the flat indices `at`.

        `mask` is boolean, [batch, 1, time, time], true where a query (row) may look at a key (column).
        """
        cos, sin = rotary(positions, self.shape.head_dim)
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            x, cos, sin = x.bfloat16(), cos.bfloat16(), sin.bfloat16()
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        x = self.model.norm(x)
        if at is not None:
            x = x.flatten(0, 1)[at]
        return self.lm_head(x)
