"""Every Triton kernel compiles for sm_80 and sm_90 at each config that tuning may choose, without spill or atomic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.triton_kernels import Compiled, compile_kernel

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402

from advdl_ops.triton import (  # noqa: E402
    conv2d,
    conv2d_kernels,
    depthwise_conv2d,
    depthwise_conv2d_kernels,
)

ARCHITECTURES = (80, 90)
# Shared memory that one block may have: 164 KiB less 1 on A100, 228 KiB less 1 on H100.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# id -> dtype of the tensors, whether products of fp32 may be in TF32
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
TRITON_NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
INTEGERS = dict.fromkeys(
    ("pixels", "in_h", "in_w", "out_h", "out_w", "in_channels", "out_channels", "group_in", "group_out"),
    "i32",
)  # fmt: skip
GEOMETRY = {
    "KH": 3,
    "KW": 3,
    "STRIDE_H": 1,
    "STRIDE_W": 1,
    "PAD_H": 1,
    "PAD_W": 1,
    "DIL_H": 1,
    "DIL_W": 1,
}
STRIDED = {"STRIDE_H": 2, "STRIDE_W": 2, "STEP_H": 2, "STEP_W": 2}
SILU = 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled here and now, whatever an earlier run has left."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def cases(configs: tuple[conv2d.Config, ...], *more: bool) -> list[Any]:
    return [
        pytest.param(name, config, arch, *more, id=f"{name}-{'x'.join(map(str, config))}-sm_{arch}")
        for name, (dtype, tf32) in PRECISIONS.items()
        for config in suitable(configs, dtype, tf32)
        for arch in ARCHITECTURES
    ]


def with_plain(configs: tuple[conv2d.Config, ...]) -> list[Any]:
    """With all that a kernel can do, which takes the most registers; and without, in bf16 alone."""
    plain = [
        pytest.param(*case.values[:3], False, id=f"{case.id}-plain")
        for case in cases(configs)
        if case.values[0] == "bf16"
    ]
    return cases(configs, True) + plain


def suitable(
    configs: tuple[conv2d.Config, ...], dtype: torch.dtype, tf32: bool
) -> tuple[conv2d.Config, ...]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        return conv2d.suitable_configs(configs, dtype)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check(compiled: Compiled, arch: int) -> None:
    assert compiled.stack == 0, "registers are spilled"
    assert compiled.shared <= SHARED[arch]
    assert "atom." not in compiled.ptx and "red." not in compiled.ptx.replace("shared.", "")


def blocks(config: conv2d.Config, precision: str) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def launch(config: conv2d.Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


@pytest.mark.parametrize(
    ("precision", "config", "arch", "full"), with_plain(conv2d.FORWARD_CONFIGS)
)
def test_conv2d_forward(precision: str, config: conv2d.Config, arch: int, full: bool) -> None:
    x = TRITON_NAMES[PRECISIONS[precision][0]]
    types = INTEGERS | dict.fromkeys(("x_ptr", "w_ptr", "out_ptr"), x)
    types |= {"act_param": "fp32", "prologue_param": "fp32"}
    act = {"ACT": 0, "PROLOGUE_ACT": 0}
    if full:
        vectors = "scale_ptr", "shift_ptr", "prologue_scale_ptr", "prologue_shift_ptr"
        types |= dict.fromkeys((*vectors, "partial_ptr"), "*fp32") | {"residual_ptr": x}
        act = {"ACT": SILU, "PROLOGUE_ACT": SILU}
    constants = GEOMETRY | act | blocks(config, precision)
    compiled = compile_kernel(
        conv2d_kernels.forward_kernel, types, constants, arch, **launch(config)
    )
    check(compiled, arch)
    if precision != "fp32":
        assert ("wgmma" if arch == 90 else "mma.sync") in compiled.ptx


@pytest.mark.parametrize(("precision", "config", "arch"), cases(conv2d.INPUT_GRADIENT_CONFIGS))
def test_conv2d_input_gradient(precision: str, config: conv2d.Config, arch: int) -> None:
    x = TRITON_NAMES[PRECISIONS[precision][0]]
    types = INTEGERS | {"batch": "i32", "dz_ptr": x, "w_ptr": x, "dx_ptr": x}
    del types["pixels"]
    constants = GEOMETRY | STRIDED | blocks(config, precision)
    compiled = compile_kernel(
        conv2d_kernels.input_gradient_kernel, types, constants, arch, **launch(config)
    )
    check(compiled, arch)


@pytest.mark.parametrize(
    ("precision", "config", "arch", "full"), with_plain(conv2d.WEIGHT_GRADIENT_CONFIGS)
)
def test_conv2d_weight_gradient(
    precision: str, config: conv2d.Config, arch: int, full: bool
) -> None:
    x = TRITON_NAMES[PRECISIONS[precision][0]]
    types = INTEGERS | {
        "split_pixels": "i32",
        "dz_ptr": x,
        "x_ptr": x,
        "partial_ptr": "*fp32",
        "prologue_param": "fp32",
    }
    if full:
        types |= {"prologue_scale_ptr": "*fp32", "prologue_shift_ptr": "*fp32"}
    constants = GEOMETRY | {"PROLOGUE_ACT": SILU if full else 0} | blocks(config, precision)
    compiled = compile_kernel(
        conv2d_kernels.weight_gradient_kernel, types, constants, arch, **launch(config)
    )
    check(compiled, arch)


def depthwise(configs: tuple[depthwise_conv2d.Config, ...]) -> list[Any]:
    """Half and full precision in turn: they differ by two conversions."""
    return [
        pytest.param(x, config, arch, id=f"{x[1:]}-{'x'.join(map(str, config))}-sm_{arch}")
        for i, config in enumerate(configs)
        for j, arch in enumerate(ARCHITECTURES)
        for x in (("*bf16", "*fp32")[(i + j) % 2],)
    ]


def depthwise_types(*names: str) -> dict[str, str]:
    return dict.fromkeys((*names, "in_h", "in_w", "out_h", "out_w", "channels"), "i32")


def depthwise_blocks(config: depthwise_conv2d.Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


@pytest.mark.parametrize(("x", "config", "arch"), depthwise(depthwise_conv2d.FORWARD_CONFIGS))
def test_depthwise_forward(x: str, config: depthwise_conv2d.Config, arch: int) -> None:
    types = depthwise_types("pixels") | {
        "x_ptr": x, "w_ptr": x, "out_ptr": x, "residual_ptr": x, "scale_ptr": "*fp32", "shift_ptr": "*fp32",
        "act_param": "fp32",
    }  # fmt: skip
    constants = GEOMETRY | {"KH": 7, "KW": 7, "ACT": SILU} | depthwise_blocks(config)
    kernel = depthwise_conv2d_kernels.depthwise_forward_kernel
    check(compile_kernel(kernel, types, constants, arch, num_warps=config.num_warps), arch)


@pytest.mark.parametrize(
    ("x", "config", "arch"), depthwise(depthwise_conv2d.INPUT_GRADIENT_CONFIGS)
)
def test_depthwise_input_gradient(x: str, config: depthwise_conv2d.Config, arch: int) -> None:
    types = depthwise_types("batch") | {"dz_ptr": x, "w_ptr": x, "dx_ptr": x}
    constants = GEOMETRY | STRIDED | {"KH": 7, "KW": 7} | depthwise_blocks(config)
    kernel = depthwise_conv2d_kernels.depthwise_input_gradient_kernel
    check(compile_kernel(kernel, types, constants, arch, num_warps=config.num_warps), arch)


@pytest.mark.parametrize(
    ("x", "config", "arch"), depthwise(depthwise_conv2d.WEIGHT_GRADIENT_CONFIGS)
)
def test_depthwise_weight_gradient(x: str, config: depthwise_conv2d.Config, arch: int) -> None:
    types = depthwise_types("pixels", "split_pixels") | {"dz_ptr": x, "x_ptr": x, "partial_ptr": "*fp32"}  # fmt: skip
    constants = GEOMETRY | depthwise_blocks(config)
    kernel = depthwise_conv2d_kernels.depthwise_weight_gradient_kernel
    check(compile_kernel(kernel, types, constants, arch, num_warps=config.num_warps), arch)


@pytest.mark.parametrize(
    "module", [conv2d_kernels, depthwise_conv2d_kernels], ids=["conv2d", "depthwise_conv2d"]
)
def test_sizes_of_one(module: Any) -> None:
    """Triton makes a constant of every integer that is 1, which has not all that a value has."""
    constants = GEOMETRY | {
        "STEP_H": 1, "STEP_W": 1, "ACT": 1, "PROLOGUE_ACT": 1, "PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_N": 16,
        "BLOCK_K": 16, "ROWS": 16, "BLOCK_R": 16, "BLOCK_C": 16, "BLOCK": 64,
    }  # fmt: skip
    kernels = [k for name, k in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) >= 3
    for kernel in kernels:
        names = kernel.arg_names
        types = {name: "*fp32" for name in names if name.endswith("_ptr")}
        types |= {name: "fp32" for name in names if name.endswith("_param")}
        values = {name: constants.get(name, 1) for name in names if name not in types}
        check(compile_kernel(kernel, types, values, 90, num_warps=4), 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_workspace_kernels(arch: int) -> None:
    types = {
        "partial_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "blocks": "i32",
        "pixels": "i32",
        "channels": "i32",
    }
    for rows in sorted({config.block_m for config in conv2d.FORWARD_CONFIGS}):
        constants = {"ROWS": rows, "BLOCK_R": 64, "BLOCK_C": 16}
        kernel = conv2d_kernels.merge_statistics_kernel
        check(compile_kernel(kernel, types, constants, arch, num_warps=4), arch)
    types = {"partial_ptr": "*fp32", "out_ptr": "*fp32", "splits": "i32", "size": "i32"}
    kernel = conv2d_kernels.sum_splits_kernel
    check(compile_kernel(kernel, types, {"BLOCK": 256}, arch, num_warps=4), arch)


@triton.jit
def _hungry_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    """Every value stays alive until all of them are summed."""
    x = tl.load(x_ptr + tl.arange(0, COUNT))
    tl.store(out_ptr + tl.arange(0, COUNT), x * tl.sum(x))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_spill_is_seen(arch: int) -> None:
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    assert compile_kernel(_hungry_kernel, types, {"COUNT": 32 * 16}, arch, num_warps=1).stack == 0
    spilled = compile_kernel(_hungry_kernel, types, {"COUNT": 32 * 512}, arch, num_warps=1)
    assert spilled.stack > 0
    with pytest.raises(AssertionError, match="spilled"):
        check(spilled, arch)


def test_tf32_only_where_convolutions_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert conv2d._precision(torch.float32) == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert conv2d._precision(torch.float32) == "ieee"
    assert conv2d._precision(torch.bfloat16) == "ieee"


def test_the_package_imports_no_triton() -> None:
    code = "import sys, advdl_ops; sys.exit('triton' in sys.modules or 'advdl_ops.triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kernel_is_compiled_here() -> None:
    """A kernel that is added to a file of kernels is added here."""
    source = Path(__file__).read_text()
    for path in (Path(conv2d.__file__).parent).glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("def ") and "_kernel(" in line:
                assert f".{line[4:].split('(')[0]}" in source, line
