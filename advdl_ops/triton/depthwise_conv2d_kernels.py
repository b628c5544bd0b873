"""Depthwise convolution over channels_last tensors; launched by :mod:`advdl_ops.triton.depthwise_conv2d`.

In memory, x is [N, H, W, C], w is [KH, KW, C], z (the output) is [N, OH, OW, C]. Every program owns a part of the
output, so there are no atomics. Sums are in fp32. Row numbers have 32 bits, offsets 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv2d_kernels import first_tap, phase_pixels, store_output


@triton.jit
def depthwise_forward_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, shift_ptr, residual_ptr, act_param, pixels, in_h, in_w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows are output pixels, columns are channels."""
    blocks_n = tl.cdiv(channels, BLOCK_N)
    rows = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < pixels
    col_mask = cols < channels
    line = rows // out_w
    top = line % out_h * STRIDE_H - PAD_H
    left = rows % out_w * STRIDE_W - PAD_W
    corner = ((line // out_h).to(tl.int64) * in_h + top) * in_w + left
    x_rows = x_ptr + (corner * channels)[:, None] + cols[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for kh in range(KH):
        ih = top + kh * DIL_H
        row_inside = row_mask & (ih >= 0) & (ih < in_h)
        for kw in tl.static_range(KW):
            iw = left + kw * DIL_W
            inside = row_inside & (iw >= 0) & (iw < in_w)
            distance = (tl.cast(kh * DIL_H, tl.int64) * in_w + kw * DIL_W) * channels
            x = tl.load(x_rows + distance, mask=inside[:, None] & col_mask[None, :], other=0.0)
            w = tl.load(w_ptr + (kh * KW + kw) * channels + cols, mask=col_mask, other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]

    mask = row_mask[:, None] & col_mask[None, :]
    offsets = rows.to(tl.int64)[:, None] * channels + cols[None, :]
    store_output(
        acc, out_ptr, offsets, mask, cols, col_mask, scale_ptr, shift_ptr, residual_ptr, act_param, ACT
    )  # fmt: skip


@triton.jit
def depthwise_input_gradient_kernel(
    dz_ptr, w_ptr, dx_ptr, batch, in_h, in_w, out_h, out_w, channels,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows are the input pixels of one phase (program axis 1), see :func:`.conv2d_kernels.input_gradient_kernel`."""
    phase_h = tl.program_id(1) // STRIDE_W
    phase_w = tl.program_id(1) % STRIDE_W
    phase_rows = (in_h - phase_h + STRIDE_H - 1) // STRIDE_H
    phase_cols = (in_w - phase_w + STRIDE_W - 1) // STRIDE_W
    blocks_n = tl.cdiv(channels, BLOCK_N)
    rows = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < batch * phase_rows * phase_cols
    col_mask = cols < channels
    image, ih, iw = phase_pixels(rows, phase_h, phase_w, phase_rows, phase_cols, STRIDE_H, STRIDE_W)
    first_h = first_tap(phase_h, PAD_H, KH, STRIDE_H, DIL_H)
    first_w = first_tap(phase_w, PAD_W, KW, STRIDE_W, DIL_W)
    bottom = (ih + PAD_H - first_h * DIL_H) // STRIDE_H
    right = (iw + PAD_W - first_w * DIL_W) // STRIDE_W
    dz_rows = (
        dz_ptr + (((image * out_h + bottom) * out_w + right) * channels)[:, None] + cols[None, :]
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # The most steps of any phase. A tap past the end of the kernel is masked.
    for step_h in range((KH + STEP_H - 1) // STEP_H):
        kh = first_h + step_h * STEP_H
        oh = bottom - step_h * (STEP_H * DIL_H // STRIDE_H)
        row_inside = row_mask & (kh < KH) & (oh >= 0) & (oh < out_h)
        for step_w in tl.static_range((KW + STEP_W - 1) // STEP_W):
            kw = first_w + step_w * STEP_W
            ow = right - step_w * (STEP_W * DIL_W // STRIDE_W)
            inside = row_inside & (kw < KW) & (ow >= 0) & (ow < out_w)
            distance = (
                tl.cast(step_h * (STEP_H * DIL_H // STRIDE_H), tl.int64) * out_w
                + step_w * (STEP_W * DIL_W // STRIDE_W)
            ) * channels
            dz = tl.load(dz_rows - distance, mask=inside[:, None] & col_mask[None, :], other=0.0)
            w_mask = col_mask & (kh < KH) & (kw < KW)
            w = tl.load(w_ptr + (kh * KW + kw) * channels + cols, mask=w_mask, other=0.0)
            acc += dz.to(tl.float32) * w.to(tl.float32)[None, :]

    offsets = ((image * in_h + ih) * in_w + iw) * channels
    tl.store(
        dx_ptr + offsets[:, None] + cols[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def depthwise_weight_gradient_kernel(
    dz_ptr, x_ptr, partial_ptr, pixels, in_h, in_w, out_h, out_w, channels, split_pixels,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tap of a block of channels, over the output pixels of one split (program axis 1).

    split_pixels is a multiple of BLOCK_M; partial is [splits, KH, KW, C].
    """
    # The taps of a block run one after another, because all of them read the same dz and nearly the same x.
    tap = tl.program_id(0) % (KH * KW)
    cols = tl.program_id(0) // (KH * KW) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < channels
    down = tap // KW * DIL_H - PAD_H
    across = tap % KW * DIL_W - PAD_W
    start = tl.program_id(1) * split_pixels
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.minimum(split_pixels, pixels - start), BLOCK_M):
        pixel = start + k + tl.arange(0, BLOCK_M)
        line = pixel // out_w
        ih = line % out_h * STRIDE_H + down
        iw = pixel % out_w * STRIDE_W + across
        inside = (pixel < pixels) & (ih >= 0) & (ih < in_h) & (iw >= 0) & (iw < in_w)
        mask = inside[:, None] & col_mask[None, :]
        place = (((line // out_h).to(tl.int64) * in_h + ih) * in_w + iw) * channels
        x = tl.load(x_ptr + place[:, None] + cols[None, :], mask=mask, other=0.0)
        dz_rows = dz_ptr + (pixel.to(tl.int64) * channels)[:, None]
        dz = tl.load(dz_rows + cols[None, :], mask=mask, other=0.0)
        acc += x.to(tl.float32) * dz.to(tl.float32)
    row = tl.program_id(1).to(tl.int64) * (KH * KW) + tap
    tl.store(partial_ptr + row * channels + cols, tl.sum(acc, axis=0), mask=col_mask)
