"""The layers of the backbone: attention over context and block, gated MLP, RMS norm, RoPE."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_lab.attention import attend
from dspark_lab.model.config import DrafterConfig, Yarn
from dspark_lab.model.rows import KeyValues
from dspark_lab.model.slotwise import at_least_fp32


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in fp32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """The normed input, in its own dtype."""
        wide = at_least_fp32(x.dtype)
        normed = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return normed.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], **mask: Any
    ) -> Tensor:
        return self.around(x, partial(self.self_attn, context=context, angles=angles, **mask))

    def around(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer with this attention in its place."""
        x = x + attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        d, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = width
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=bias)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self, x: Tensor, context: Tensor, angles: tuple[Tensor, Tensor], **mask: Any
    ) -> Tensor:
        """Attention to the context and the own block; ``mask`` is for :func:`attend`."""
        # Under autocast the two come in different dtypes.
        k, v = self.keys_values(torch.cat([context.to(x.dtype), x], dim=1), angles)
        of_slots = (angles[0][:, :, -x.shape[1] :], angles[1][:, :, -x.shape[1] :])
        q = self.queries(x, of_slots)
        return self.o_proj(attend(q, k, v, **mask).transpose(1, 2).flatten(2))

    def cached(
        self,
        x: Tensor,
        past: KeyValues,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """The same for one block a row, with its context's keys and values, ``past``."""
        q = self.queries(x, angles)
        k, v = past.write(*self.keys_values(x, angles))
        seen = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(seen.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q = self._heads(self.q_proj(x))
        return rotate(self.q_norm(q), angles).to(q.dtype)

    def keys_values(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return rotate(self.k_norm(k), angles).to(v.dtype), v

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads seq head_dim"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope(
    positions: Int[Tensor, "batch seq"], config: DrafterConfig, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch 1 seq half"], Float[Tensor, "batch 1 seq half"]]:
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864), in fp32 at least."""
    wide = at_least_fp32(dtype)
    pair = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)
    frequency = config.rope_theta ** (-pair / config.head_dim)
    factor = 1.0
    if config.yarn is not None:
        frequency, factor = _yarn(frequency, config.yarn, config.rope_theta, config.head_dim)
    angle = positions.to(wide).unsqueeze(-1) * frequency
    return factor * angle.cos().unsqueeze(1), factor * angle.sin().unsqueeze(1)


def _yarn(
    frequency: Float[Tensor, " half"], yarn: Yarn, theta: float, head_dim: int
) -> tuple[Float[Tensor, " half"], float]:
    """The frequencies of YaRN, and the factor on cosine and sine (arXiv 2309.00071, section 3).

    Pairs that turn more than ``beta_fast`` times over the original length stay as they are, those
    that turn less than ``beta_slow`` times are slowed down by ``factor``, with a ramp between.
    """

    def pair_of(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    place = torch.arange(len(frequency), device=frequency.device, dtype=frequency.dtype)
    slowed = ((place - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - slowed + slowed / yarn.factor), _attention_factor(yarn)


def _attention_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn.factor) + 1

    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1.0)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], angles: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns each pair (i, i + head_dim / 2) by its angle."""
    cos, sin = angles
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
