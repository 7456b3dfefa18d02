"""Diffusion noise on images, for BDHS_noise and POVID: eq. 8 and 9 of Amirloo et al. 2024."""

import math

import numpy as np
import torch
from PIL import Image


def alpha_bar(steps):
    """Share of the signal's variance after so many of 1000 diffusion steps (eq. 9).

    The schedule is POVID's, and so is the index: n steps multiply n + 1 factors. 0 steps: 1.
    """
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - beta).cumprod(0)[steps]) if steps else 1.0


def diffuse(image, steps, generator):
    """Eq. 8 on an RGB image, x in 0 .. 1: sqrt(abar) x + sqrt(1 - abar) eps, clamped -> RGB image.

    As in POVID's code this is the image as it is on disk: padding gets no noise, all tiles show the
    same, and shrinking to the tower's size averages much of it away.
    """
    if not steps:
        return image
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)  # (3, H, W)
    abar = alpha_bar(steps)
    noisy = math.sqrt(abar) * x + math.sqrt(1 - abar) * torch.randn(x.shape, generator=generator)
    return Image.fromarray((noisy.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
