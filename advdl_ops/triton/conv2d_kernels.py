"""Convolution as implicit matrix products over channels_last tensors; launched by :mod:`advdl_ops.triton.conv2d`.

In memory, x is [N, H, W, C_in], w is [C_out, KH, KW, C_in / groups], z (the output) is [N, OH, OW, C_out]. Every
program owns a part of the output, so there are no atomics. Sums are in fp32. Row numbers have 32 bits, offsets 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def _tile(pid, blocks_m, blocks_n):
    """Block row and column of a program. Consecutive programs go down 8 block rows, to share operands in L2."""
    group = pid // (8 * blocks_n)
    size = tl.minimum(blocks_m - group * 8, 8)
    within = pid - group * 8 * blocks_n
    return group * 8 + within % size, within // size


@triton.jit
def first_tap(phase, PAD: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr):  # fmt: skip
    """The first tap that connects any output to the input positions ``phase + i * STRIDE``; KERNEL if there is none."""
    first = phase * 0 + KERNEL
    for i in tl.static_range(KERNEL):
        # From the last tap to the first. The last summand keeps the dividend positive, as languages differ for negative
        # ones.
        distance = phase + PAD - (KERNEL - 1 - i) * DIL + KERNEL * DIL * STRIDE
        first = tl.where(distance % STRIDE == 0, KERNEL - 1 - i, first)
    return first


@triton.jit
def phase_pixels(
    rows, phase_h, phase_w, phase_rows, phase_cols, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr
):
    """Image, row and column of input pixels. ``rows`` are their numbers within one phase of the input."""
    # An input smaller than the stride has phases without a pixel: avoid division by zero.
    per_row = tl.maximum(phase_cols, 1)
    per_image = tl.maximum(phase_rows, 1)
    line = rows // per_row
    image = (line // per_image).to(tl.int64)
    return image, line % per_image * STRIDE_H + phase_h, rows % per_row * STRIDE_W + phase_w


@triton.jit
def store_output(
    acc, out_ptr, offsets, mask, cols, col_mask, scale_ptr, shift_ptr, residual_ptr, act_param, ACT: tl.constexpr
):  # fmt: skip
    """Stores act(acc * scale + shift + residual), and returns it in the output's dtype."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = activate(acc, act_param, ACT).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)
    return out


@triton.jit
def _normalized(x, mask, channels, channel_mask, scale_ptr, shift_ptr, param, ACT: tl.constexpr):
    """act(x * scale + shift) in x's dtype, and zero where ``mask`` is off, because padding comes after the prologue."""
    scale = tl.load(scale_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)
    z = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], param, ACT)
    return tl.where(mask, z, 0.0).to(x.dtype)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, shift_ptr, residual_ptr, prologue_scale_ptr, prologue_shift_ptr, partial_ptr,
    act_param, prologue_param, pixels, in_h, in_w, out_h, out_w, in_channels, out_channels, group_in, group_out,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACT: tl.constexpr, PROLOGUE_ACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows are output pixels, columns the output channels of a group, K is taps x input channels of the group."""
    blocks_m = tl.cdiv(pixels, BLOCK_M)
    blocks_n = tl.cdiv(group_out, BLOCK_N)
    tiles = blocks_m * blocks_n
    group = tl.program_id(0) // tiles
    block_m, block_n = _tile(tl.program_id(0) % tiles, blocks_m, blocks_n)

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < pixels
    col_mask = cols < group_out
    line = rows // out_w
    top = line % out_h * STRIDE_H - PAD_H
    left = rows % out_w * STRIDE_W - PAD_W
    # The pixel of tap (0, 0). The distances of the other taps from it are the same for every row.
    corner = ((line // out_h).to(tl.int64) * in_h + top) * in_w + left
    x_rows = x_ptr + corner * in_channels + group * group_in
    w_cols = w_ptr + (group * group_out + cols).to(tl.int64) * (KH * KW * group_in)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    channel_blocks = tl.cdiv(group_in, BLOCK_K)
    for k in range(KH * KW * channel_blocks):
        tap = k // channel_blocks
        channels = (k - tap * channel_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        channel_mask = channels < group_in
        down = tap // KW * DIL_H
        right = tap % KW * DIL_W
        inside = (
            (top + down >= 0) & (top + down < in_h) & (left + right >= 0) & (left + right < in_w)
        )
        mask = (row_mask & inside)[:, None] & channel_mask[None, :]
        distance = (down.to(tl.int64) * in_w + right) * in_channels
        x = tl.load(x_rows[:, None] + distance + channels[None, :], mask=mask, other=0.0)
        if prologue_scale_ptr is not None:
            x = _normalized(
                x, mask, group * group_in + channels, channel_mask, prologue_scale_ptr, prologue_shift_ptr,
                prologue_param, PROLOGUE_ACT,
            )  # fmt: skip
        w = tl.load(
            w_cols[None, :] + tap * group_in + channels[:, None],
            mask=channel_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    mask = row_mask[:, None] & col_mask[None, :]
    cols += group * group_out
    offsets = rows.to(tl.int64)[:, None] * out_channels + cols[None, :]
    out = store_output(
        acc, out_ptr, offsets, mask, cols, col_mask, scale_ptr, shift_ptr, residual_ptr, act_param, ACT
    )  # fmt: skip
    if partial_ptr is not None:
        # Statistics of the rounded output, because a batch norm would read that.
        value = tl.where(mask, out.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / tl.minimum(pixels - block_m * BLOCK_M, BLOCK_M).to(
            tl.float32
        )
        centred = tl.where(mask, value - mean[None, :], 0.0)
        partial = partial_ptr + block_m.to(tl.int64) * out_channels + cols
        tl.store(partial, mean, mask=col_mask)
        tl.store(
            partial + tl.cast(blocks_m, tl.int64) * out_channels,
            tl.sum(centred * centred, axis=0),
            mask=col_mask,
        )


@triton.jit
def merge_statistics_kernel(
    partial_ptr, sums_ptr, blocks, pixels, channels,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [2, blocks, C] of blocks of ROWS pixels (the last may have fewer) -> mean and centred squares [2, C].

    Two passes in a fixed order: the mean first, then the squares about it.
    """
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < channels
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, blocks, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < blocks)[:, None] & col_mask[None, :]
        offsets = rows.to(tl.int64)[:, None] * channels + cols[None, :]
        count = tl.minimum(pixels - rows * ROWS, ROWS).to(tl.float32)[:, None]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0) * count
    mean = tl.sum(total, axis=0) / pixels
    squares_ptr = partial_ptr + tl.cast(blocks, tl.int64) * channels
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, blocks, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < blocks)[:, None] & col_mask[None, :]
        offsets = rows.to(tl.int64)[:, None] * channels + cols[None, :]
        count = tl.minimum(pixels - rows * ROWS, ROWS).to(tl.float32)[:, None]
        away = tl.load(partial_ptr + offsets, mask=mask, other=0.0) - mean[None, :]
        squares = tl.load(squares_ptr + offsets, mask=mask, other=0.0) + count * away * away
        total += tl.where(mask, squares, 0.0)
    tl.store(sums_ptr + cols, mean, mask=col_mask)
    tl.store(sums_ptr + channels + cols, tl.sum(total, axis=0), mask=col_mask)


@triton.jit
def input_gradient_kernel(
    dz_ptr, w_ptr, dx_ptr, batch, in_h, in_w, out_h, out_w, in_channels, out_channels, group_in, group_out,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows are the input pixels of one phase, columns the input channels of a group, K taps x its output channels.

    A phase (program axis 1) consists of the input pixels that are equal modulo the stride. They have the same taps:
    every STEP-th from the first one on, STEP = STRIDE / gcd(STRIDE, DIL). The loop visits no other tap.
    """
    phase_h = tl.program_id(1) // STRIDE_W
    phase_w = tl.program_id(1) % STRIDE_W
    phase_rows = (in_h - phase_h + STRIDE_H - 1) // STRIDE_H
    phase_cols = (in_w - phase_w + STRIDE_W - 1) // STRIDE_W
    # The number of programs is that of the first phase, which is the largest.
    blocks_m = tl.cdiv(batch * tl.cdiv(in_h, STRIDE_H) * tl.cdiv(in_w, STRIDE_W), BLOCK_M)
    blocks_n = tl.cdiv(group_in, BLOCK_N)
    tiles = blocks_m * blocks_n
    group = tl.program_id(0) // tiles
    block_m, block_n = _tile(tl.program_id(0) % tiles, blocks_m, blocks_n)

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < batch * phase_rows * phase_cols
    col_mask = cols < group_in
    image, ih, iw = phase_pixels(rows, phase_h, phase_w, phase_rows, phase_cols, STRIDE_H, STRIDE_W)
    first_h = first_tap(phase_h, PAD_H, KH, STRIDE_H, DIL_H)
    first_w = first_tap(phase_w, PAD_W, KW, STRIDE_W, DIL_W)
    taps_w = (KW - first_w + STEP_W - 1) // STEP_W
    taps = (KH - first_h + STEP_H - 1) // STEP_H * taps_w
    # The output pixel that the first tap connects to each row. The divisions are exact if there is a tap at all.
    bottom = (ih + PAD_H - first_h * DIL_H) // STRIDE_H
    right = (iw + PAD_W - first_w * DIL_W) // STRIDE_W
    dz_rows = dz_ptr + ((image * out_h + bottom) * out_w + right) * out_channels + group * group_out
    w_cols = w_ptr + (group * group_out).to(tl.int64) * (KH * KW * group_in) + cols

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    channel_blocks = tl.cdiv(group_out, BLOCK_K)
    for k in range(taps * channel_blocks):
        tap = k // channel_blocks
        channels = (k - tap * channel_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        channel_mask = channels < group_out
        step_h = tap // taps_w
        step_w = tap % taps_w
        up = step_h * (STEP_H * DIL_H // STRIDE_H)
        back = step_w * (STEP_W * DIL_W // STRIDE_W)
        inside = (
            (bottom - up >= 0)
            & (bottom - up < out_h)
            & (right - back >= 0)
            & (right - back < out_w)
        )
        distance = (up.to(tl.int64) * out_w + back) * out_channels
        dz = tl.load(
            dz_rows[:, None] - distance + channels[None, :],
            mask=(row_mask & inside)[:, None] & channel_mask[None, :],
            other=0.0,
        )
        w_tap = (first_h + step_h * STEP_H) * KW + first_w + step_w * STEP_W
        w = tl.load(
            w_cols[None, :] + (channels.to(tl.int64) * (KH * KW) + w_tap)[:, None] * group_in,
            mask=channel_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(dz, w, acc, input_precision=PRECISION)

    offsets = ((image * in_h + ih) * in_w + iw) * in_channels + group * group_in
    tl.store(
        dx_ptr + offsets[:, None] + cols[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def weight_gradient_kernel(
    dz_ptr, x_ptr, partial_ptr, prologue_scale_ptr, prologue_shift_ptr, prologue_param,
    pixels, in_h, in_w, out_h, out_w, in_channels, out_channels, group_in, group_out, split_pixels,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, PROLOGUE_ACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows are the output channels of a group, columns its input channels at one tap, K the output pixels of one split.

    Program axis 1 is the split, of split_pixels (a multiple of BLOCK_K).
    partial is [splits, C_out, KH, KW, C_in / groups].
    """
    blocks_m = tl.cdiv(group_out, BLOCK_M)
    blocks_n = tl.cdiv(group_in, BLOCK_N)
    tiles = blocks_m * blocks_n
    tap = tl.program_id(0) // tiles % (KH * KW)
    group = tl.program_id(0) // (tiles * KH * KW)
    block_m, block_n = _tile(tl.program_id(0) % tiles, blocks_m, blocks_n)
    down = tap // KW * DIL_H - PAD_H
    across = tap % KW * DIL_W - PAD_W

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < group_out
    col_mask = cols < group_in
    dz_rows = dz_ptr + group * group_out + rows
    x_cols = x_ptr + group * group_in + cols

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    start = tl.program_id(1) * split_pixels
    for k in range(0, tl.minimum(split_pixels, pixels - start), BLOCK_K):
        pixel = start + k + tl.arange(0, BLOCK_K)
        pixel_mask = pixel < pixels
        line = pixel // out_w
        ih = line % out_h * STRIDE_H + down
        iw = pixel % out_w * STRIDE_W + across
        inside = pixel_mask & (ih >= 0) & (ih < in_h) & (iw >= 0) & (iw < in_w)
        mask = inside[:, None] & col_mask[None, :]
        place = (((line // out_h).to(tl.int64) * in_h + ih) * in_w + iw) * in_channels
        x = tl.load(x_cols[None, :] + place[:, None], mask=mask, other=0.0)
        if prologue_scale_ptr is not None:
            x = _normalized(
                x, mask, group * group_in + cols, col_mask, prologue_scale_ptr, prologue_shift_ptr, prologue_param,
                PROLOGUE_ACT,
            )  # fmt: skip
        dz = tl.load(
            dz_rows[None, :] + (pixel.to(tl.int64) * out_channels)[:, None],
            mask=pixel_mask[:, None] & row_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(dz), x, acc, input_precision=PRECISION)

    # The rows of all earlier splits, then those of the earlier groups.
    first_row = tl.program_id(1).to(tl.int64) * out_channels + group * group_out
    offsets = ((first_row + rows) * (KH * KW) + tap) * group_in
    tl.store(
        partial_ptr + offsets[:, None] + cols[None, :],
        acc,
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def sum_splits_kernel(partial_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    """partial [splits, size] -> out [size]. The splits are added in order, independent of the launch."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        offsets += size
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, total, mask=mask)
