"""Diffusion noise on images, for BDHS_noise and POVID: eq. 8 and 9 of Amirloo et al. 2024."""

import math

import torch


def alpha_bar(steps):
    """Share of the signal's variance after so many of 1000 diffusion steps (eq. 9).

    The schedule is POVID's, and so is the index: n steps multiply n + 1 factors. 0 steps: 1.
    """
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - beta).cumprod(0)[steps]) if steps else 1.0


def diffuse(pixels, steps, mean, std, generator):
    """Eq. 8 on normalised pixels (..., 3, H, W): sqrt(abar) x + sqrt(1 - abar) eps, x in 0 .. 1.

    The result is clamped to 0 .. 1, then normalised again with the processor's mean and std (3,).
    """
    if not steps:
        return pixels
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    abar, x = alpha_bar(steps), pixels * std + mean
    noisy = math.sqrt(abar) * x + math.sqrt(1 - abar) * torch.randn(x.shape, generator=generator)
    return (noisy.clamp(0, 1) - mean) / std
