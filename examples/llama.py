"""A Llama in plain torch, to be trained: its parameters have the checkpoint's names.

Reads config.json and *.safetensors of Llama-like models without biases (SmolLM2, Llama 3
without scaled rotary embeddings). No transformers, no safetensors: torch and fp8ctl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from fp8ctl import models, source
from fp8ctl.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Attention(nn.Module):
    """Causal attention with rotary positions and fewer heads for keys and values."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads", self.heads)
        self.side = config.get("head_dim") or width // self.heads
        self.q_proj = nn.Linear(width, self.heads * self.side, bias=False)
        self.k_proj = nn.Linear(width, self.groups * self.side, bias=False)
        self.v_proj = nn.Linear(width, self.groups * self.side, bias=False)
        self.o_proj = nn.Linear(self.heads * self.side, width, bias=False)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the layer's output for [batch, length, width]."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.side)
        q = _turned(self.q_proj(x).view(shape).transpose(1, 2), turn)
        k = _turned(self.k_proj(x).view(shape).transpose(1, 2), turn)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        several = self.heads // self.groups
        k, v = (t.repeat_interleave(several, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class Mlp(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the residual stream behind this layer."""
        x = x + self.self_attn(self.input_layernorm(x), turn)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Tokens in, logits out.

    Attributes:
        tied: whether the head is the embedding; then there is no `lm_head`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if config.get("model_type") != "llama" or config.get("rope_scaling"):
            raise UnsupportedError(
                f"model_type {config.get('model_type')!r} with rope_scaling"
                f" {config.get('rope_scaling')!r}: this example trains plain Llama models",
                hint="--model a SmolLM2, for instance",
            )
        width, words = config["hidden_size"], config["vocab_size"]
        self.tied = bool(config.get("tie_word_embeddings"))
        self.base, self.model = float(config.get("rope_theta", 10000.0)), nn.Module()
        self.side = config.get("head_dim") or width // config["num_attention_heads"]
        self.model.embed_tokens = nn.Embedding(words, width)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(width, eps=config["rms_norm_eps"])
        if not self.tied:
            self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, vocabulary] for token ids of [batch, length]."""
        inner: Any = self.model
        x = inner.embed_tokens(ids)
        turn = self._turn(ids.shape[1], x)
        for layer in inner.layers:
            x = layer(x, turn)
        x = inner.norm(x)
        logits: torch.Tensor
        logits = F.linear(x, inner.embed_tokens.weight) if self.tied else self.lm_head(x)
        return logits

    def _turn(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.side, 2, device=like.device).float() / self.side
        angle = torch.outer(torch.arange(length, device=like.device).float(), self.base**-half)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _turned(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return queries or keys with their positions in them."""
    cos, sin = turn
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every token of `ids` but the first, in FP32."""
    told = logits[:, :-1].float().log_softmax(-1)
    return told.gather(-1, ids[:, 1:, None]).squeeze(-1)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """Return the model of a folder with its weights in `dtype`.

    Raises:
        CheckpointError: it is no model's folder, or lacks weights.
        UnsupportedError: it is no plain Llama.
    """
    with torch.device("meta"):
        model = Llama(models.read_config(folder))
    state = {name: tensor.to(dtype) for name, tensor in source.read_tensors(folder)}
    if model.tied:
        state.pop("lm_head.weight", None)
    model.load_state_dict(state, assign=True)
    return model
