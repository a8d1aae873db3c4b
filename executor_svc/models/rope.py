"""Rotary frequencies, in float32 and by the formulas that transformers uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from executor_svc.models.decoder_config import RopeConfig


class Rope:
    """Angles of one rotary embedding. Nothing is cached per position: T rows of cos and sin
    cost less than one projection, and a table would hold as many rows as the context limit.
    """

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        frequencies, self._scale = inverse_frequencies(config)
        self._frequencies = frequencies.to(device)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin, each [T, rotary_dim / 2] float32."""
        angles = positions.unsqueeze(-1).float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._scale == 1.0 else (cos * self._scale, sin * self._scale)


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Frequencies [rotary_dim / 2] float32 and the factor that cos and sin are scaled by."""
    dim = config.rotary_dim
    plain = 1.0 / (config.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    if config.kind == "linear":
        return plain / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(plain, config), 1.0
    if config.kind == "yarn":
        return _yarn(plain, config), _yarn_attention_factor(config)
    return plain, 1.0


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    low_wavelength = config.original_max_position / config.low_freq_factor
    high_wavelength = config.original_max_position / config.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > low_wavelength, plain / config.factor, plain)
    smooth = (config.original_max_position / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * stretched / config.factor + smooth * stretched
    is_between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(is_between, blended, stretched)


def _yarn(plain: Tensor, config: RopeConfig) -> Tensor:
    """YaRN, https://arxiv.org/abs/2309.00071 section 3.2: interpolate the slow dimensions."""
    dim = config.rotary_dim

    def dimension(num_rotations: float) -> float:
        turns = config.original_max_position / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of width zero would divide by it
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return plain / config.factor * (1 - kept) + plain * kept


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
    return _mscale(config.factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
