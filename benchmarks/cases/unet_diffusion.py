"""The U-Net of a diffusion model (Ho et al. 2020, https://arxiv.org/abs/2006.11239), diffusers' own.

Group norm, SiLU and attention, as in https://huggingface.co/google/ddpm-cifar10-32. The zoo does not have it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .. import networks
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject


def subject(case: Case) -> Subject:
    import torch

    from ..extras import require
    from ..measure_model import Subject, random_images

    narrow = 4 if case.hidden else 1
    stock = require("diffusers").UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(width // narrow for width in (128, 256, 256, 256)),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    steps = torch.arange(case.shape[0]) * 37 % 1000
    return Subject(
        stock,
        None,
        (random_images(case), steps),
        random_images(case, seed=2),  # the noise to predict
        torch.nn.functional.mse_loss,
    )


add = functools.partial(networks.add, "ddpm_unet", subject, extras=("diffusers",))
add(4, 32, training=False)
add(4, 32, training=True)
add(2, 16, training=False, hidden=True)
add(2, 16, training=True, hidden=True)
add(128, 32, training=True, device="cuda", dtype="bfloat16")
add(128, 32, training=False, device="cuda", dtype="bfloat16")
