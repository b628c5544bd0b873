"""Every candidate of a convolution on CPU, at the shapes around each threshold of ``advdl_ops/_conv/choice.py``.

A case is the sweep of one threshold: a mode is a direction at one problem, a provider a candidate that accepts it. At
its end `run --suite choice` prints which value of each threshold the records support, see ``thresholds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry import Case, register

if TYPE_CHECKING:
    import torch

    from advdl_ops._conv.problem import Problem

    from ..session import Session

CONTIGUOUS, LAST = "contiguous", "channels_last"
FORWARD, DX, DWEIGHT, FOLDED = "forward", "input_gradient", "weight_gradient", "folded"


@dataclass(frozen=True)
class Point:
    """One convolution: x ``[N, C_in, H, W]``, weight ``[C_out, C_in / groups, k, k]``, fp32."""

    x: tuple[int, int, int, int]
    outputs: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    layout: str = CONTIGUOUS
    weight_layout: str = CONTIGUOUS

    def problem(self, direction: str) -> Problem:
        """As the choice is asked with the threads that torch has now."""
        import torch

        from advdl_ops._conv.problem import BOTH, Problem

        channels = self.x[1]
        groups = channels if self.depthwise else 1
        padding = self.dilation * (self.kernel // 2)
        weight = self.outputs, channels // groups, self.kernel, self.kernel
        weight_layout = BOTH if self.depthwise or self.kernel == 1 else self.weight_layout
        epilogue = "shift" if direction in (FORWARD, FOLDED) else self.layout
        return Problem(
            direction, self.x, weight, torch.float32, self.layout, weight_layout,
            (self.stride,) * 2, (padding,) * 2, (self.dilation,) * 2, groups,
            epilogue, True, False, torch.get_num_threads(),
        )  # fmt: skip

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.x)), f"to {self.outputs}", f"{self.kernel}x{self.kernel}"]
        if self.stride > 1:
            parts.append(f"stride {self.stride}")
        if self.dilation > 1:
            parts.append(f"dilation {self.dilation}")
        if self.depthwise:
            parts.append("depthwise")
        if self.weight_layout != CONTIGUOUS:
            parts.append(f"weight {self.weight_layout}, x")
        return " ".join([*parts, self.layout])


@dataclass(frozen=True)
class Sweep:
    """The points at which a threshold decides.

    Attributes:
        threshold: field of ``Thresholds``.
        directions: that it is a threshold of.
        values: that it might have.
        points: on both sides of each value.
    """

    threshold: str
    directions: tuple[str, ...]
    values: tuple[int, ...]
    points: tuple[Point, ...]

    def problems(self) -> dict[str, Problem]:
        """By the mode of their records."""
        return {
            f"{direction} {point}": point.problem(direction)
            for direction in self.directions
            for point in self.points
        }


def _images(channels: int, pixels: int, stride: int = 1) -> tuple[int, int, int, int]:
    """An image of so many output pixels, in a batch of images of at most 14x14."""
    side = next(s for s in (14, 8, 4, 2, 1) if pixels % (s * s) == 0)
    return pixels // (side * side), channels, side * stride, side * stride


def _by_pixels(
    channels: Sequence[int],
    pixels: Sequence[int],
    layout: str,
    kernels: tuple[int, ...] = (1, 3),
    **options: Any,
) -> tuple[Point, ...]:
    stride = options.get("stride", 1)
    return tuple(
        Point(_images(c, n, stride), c, kernel, layout=layout, **options)
        for c in channels
        for kernel in kernels
        for n in pixels
    )


def _small_images(layout: str, **options: Any) -> tuple[Point, ...]:
    """The last stages of a ResNet of small images."""
    return tuple(
        point
        for n in (4, 8, 16, 32)
        for point in (
            Point((n, 512, 4, 4), 512, layout=layout, **options),
            Point((n, 256, 7, 7), 512, stride=2, layout=layout, **options),
        )
    )


_FEW = (64, 128, 196, 256, 392, 512, 784, 1024, 1568)
_MANY = (*_FEW, 2048, 3136)
_DILATION_VALUES = (2, 3, 4, 6, 8, 12, 16, 24)
_DILATED = tuple(
    Point(x, x[1], dilation=dilation)
    # With 32 channels Winograd does not serve.
    for x in ((16, 32, 56, 56), (16, 64, 56, 56), (4, 128, 28, 28), (2, 256, 33, 33))
    for dilation in (2, 3, 4, 6, 8, 12, 16)
)
_SIZES = tuple(int(2 ** (n / 2)) for n in range(38, 56))
_ROWS = 0, 4, 6, 7, 8, 10, 12, 14, 20
_SHORT_ROWS = tuple(
    Point((8, c, n, n), c, depthwise=True) for c in (64, 256, 512) for n in (4, 7, 10, 14, 20)
)
# Of 6.4 MB.
_LARGE_ROWS = tuple(
    Point((batch, c, n, n), c, depthwise=True)
    for batch, c, n in (
        (196, 512, 4), (64, 512, 7), (32, 1024, 7), (32, 512, 10), (32, 256, 14), (16, 512, 14), (8, 512, 20),
        (16, 256, 20),
    )
)  # fmt: skip
_STRIDED_DEPTHWISE = tuple(
    Point((8, c, side, side), c, stride=2, depthwise=True)
    for c in (32, 128)
    for side in (14, 28, 40, 56, 80, 112)
)

# Images and pixels in a row, from one image of 7x7 on.
_WINOGRAD_IMAGES = ((1, 7), (1, 10), (1, 14), (2, 14), (4, 14), (1, 28), (8, 14), (2, 28), (1, 56))
_WINOGRAD_PIXELS = 0, 49, 100, 196, 392, 784, 1568, 3136
_NEVER = 1 << 30


def _by_winograd(layout: str) -> tuple[Point, ...]:
    return tuple(
        Point((n, c, side, side), c, layout=layout)
        for c in (64, 256, 512)
        for n, side in _WINOGRAD_IMAGES
    )


_OVERHANGS = tuple(
    Point((n, c, side, side), c, dilation=dilation, layout=layout)
    for n, c, side in ((2, 64, 56), (4, 128, 33), (4, 256, 17))
    for dilation in (1, 2, 3, 4, 6, 8, 12)
    for layout in (CONTIGUOUS, LAST)
)

SWEEPS = (
    Sweep(
        "winograd_channels",
        (FORWARD, DX, DWEIGHT, FOLDED),
        (8, 16, 24, 32, 48, 64, 96, 128, _NEVER),
        tuple(
            Point((4, c, 28, 28), c, layout=layout)
            for c in (8, 16, 24, 32, 48, 64, 96)
            for layout in (CONTIGUOUS, LAST)
        ),
    ),
    Sweep("winograd_pixels", (FORWARD, DX), (*_WINOGRAD_PIXELS, _NEVER), _by_winograd(LAST)),
    Sweep(
        "winograd_pixels_contiguous",
        (FORWARD, DX),
        (*_WINOGRAD_PIXELS, _NEVER),
        _by_winograd(CONTIGUOUS),
    ),
    Sweep(
        "winograd_pixels_kept",
        (FOLDED,),
        (*_WINOGRAD_PIXELS, _NEVER),
        _by_winograd(LAST) + _by_winograd(CONTIGUOUS),
    ),
    Sweep(
        "winograd_pixels_dweight",
        (DWEIGHT,),
        (*_WINOGRAD_PIXELS, _NEVER),
        _by_winograd(LAST) + _by_winograd(CONTIGUOUS),
    ),
    Sweep(
        "winograd_waste",
        (FORWARD, DX, DWEIGHT, FOLDED),
        (100, 120, 140, 160, 180, 200, 220, 250, 300),
        _OVERHANGS,
    ),
    Sweep(
        "small",
        (FORWARD,),
        (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        tuple(
            Point((1, c, side, side), c, kernel, layout=layout)
            for c in (8, 16, 24)
            for kernel in (1, 3)
            for side in (8, 12, 16, 24, 32, 48)
            for layout in (CONTIGUOUS, LAST)
        ),
    ),
    Sweep(
        "few_channels",
        (FORWARD, DX, DWEIGHT),
        (8, 16, 24, 32, 48, 64, 96),
        tuple(
            Point((2, c, 8, 8), c, kernel, layout=LAST)
            for c in (8, 16, 24, 32, 48, 64)
            for kernel in (1, 3)
        ),
    ),
    Sweep(
        "few_pixels",
        (FORWARD, DX, DWEIGHT),
        (1, 8, 16, 24, 32, 48, 64, 96, 128),
        tuple(
            Point((n, c, 1, 1) if kernel == 1 else (n, c, 2, 2), c, kernel, layout=LAST)
            for c in (64, 256)
            for kernel in (1, 3)
            for n in (2, 4, 8, 12, 16, 24, 32)
        ),
    ),
    Sweep("pixels", (FORWARD, DX), (0, *_FEW), _by_pixels((64, 256, 512), _FEW, LAST)),
    Sweep("pixels_contiguous", (FORWARD, DX), (0, *_FEW), _by_pixels((32, 64), _FEW, CONTIGUOUS)),
    Sweep(
        "pixels_contiguous_many",
        (FORWARD, DX),
        (0, *_FEW),
        _by_pixels((256, 512), _FEW, CONTIGUOUS) + _small_images(CONTIGUOUS),
    ),
    Sweep(
        "pixels_weight_last",
        (FORWARD, DX),
        (0, *_FEW),
        tuple(
            point
            for layout in (CONTIGUOUS, LAST)
            for point in (
                *_by_pixels((64, 256), _FEW, layout, (3,), weight_layout=LAST),
                *_small_images(layout, weight_layout=LAST),
            )
        ),
    ),
    Sweep(
        "pixels_strided",
        (DX,),
        (0, *_MANY),
        _by_pixels((64, 256), _MANY, LAST, stride=2)
        + _by_pixels((64, 256), _MANY, CONTIGUOUS, stride=2),
    ),
    Sweep(
        "pixels_dweight",
        (DWEIGHT,),
        (0, *_MANY),
        _by_pixels((128, 256, 512), _MANY, LAST, (3,)) + _small_images(LAST),
    ),
    Sweep(
        "pixels_dweight_contiguous",
        (DWEIGHT,),
        (0, *_MANY),
        _by_pixels((128, 256, 512), _MANY, CONTIGUOUS, (3,)) + _small_images(CONTIGUOUS),
    ),
    Sweep(
        "pixels_dweight_weight_last",
        (DWEIGHT,),
        (0, *_MANY),
        tuple(
            point
            for layout in (CONTIGUOUS, LAST)
            for point in (
                *_by_pixels((128, 256), _MANY, layout, (3,), weight_layout=LAST),
                *_small_images(layout, weight_layout=LAST),
            )
        ),
    ),
    Sweep(
        "pixels_dweight_1x1",
        (DWEIGHT,),
        (0, *_MANY),
        _by_pixels((128, 256, 512), _MANY, LAST, (1,))
        + _by_pixels((128, 256, 512), _MANY, CONTIGUOUS, (1,)),
    ),
    Sweep(
        "many_channels",
        (DWEIGHT,),
        (32, 64, 96, 128, 192, 256, 384),
        _by_pixels((32, 64, 96, 128, 192, 256), (392, 512), LAST),
    ),
    Sweep(
        "pixels_dweight_dilated",
        (DWEIGHT,),
        (0, *_MANY, 4096, 8192),
        tuple(
            Point((n, c, side, side), c, dilation=12, layout=layout)
            for c in (64, 256)
            for side in (16, 33)
            for n in (1, 2, 4, 8)
            for layout in (CONTIGUOUS, LAST)
        ),
    ),
    Sweep("large_dilation", (FORWARD, DX), _DILATION_VALUES, _DILATED),
    Sweep("large_dilation_dweight", (DWEIGHT,), _DILATION_VALUES, _DILATED),
    Sweep("short_row", (FORWARD, DX, FOLDED), _ROWS, _SHORT_ROWS),
    Sweep("short_row_dweight", (DWEIGHT,), _ROWS, _SHORT_ROWS),
    Sweep("short_row_large", (FORWARD, DX, DWEIGHT, FOLDED), _ROWS, _LARGE_ROWS),
    Sweep("depthwise_cached_bytes", (FORWARD, DX, DWEIGHT), _SIZES, _STRIDED_DEPTHWISE),
    Sweep("depthwise_strided_bytes", (FORWARD,), _SIZES, _STRIDED_DEPTHWISE),
    Sweep("depthwise_strided_dx_bytes", (DX,), (0, *_SIZES), _STRIDED_DEPTHWISE),
    Sweep("depthwise_strided_dweight_bytes", (DWEIGHT,), (0, *_SIZES), _STRIDED_DEPTHWISE),
)


def run(case: Case, session: Session) -> None:
    import torch

    from advdl_ops._conv import choice

    from .. import timing

    sweep = case.options["sweep"]
    assert isinstance(sweep, Sweep)
    device = torch.device("cpu")
    problems = sweep.problems()
    for done, (mode, problem) in enumerate(problems.items()):
        session.progress(mode, done, len(problems))
        calls = {
            candidate.name: timing.Timed(_call(problem, candidate))
            for candidate in choice.candidates(problem, device)
        }
        if len(calls) > 1:
            seconds = timing.measure(calls, device, session.rounds, session.block_seconds / 4)
            for name, values in seconds.items():
                session.record(name, mode, "time", "s", values)


def _call(problem: Problem, candidate: Any) -> Callable[[], Any]:
    """One call as the operators make it, conversions counted; what is kept from call to call is not."""
    import torch

    from advdl_ops._conv import choice, cpu
    from advdl_ops._conv.operators import gradients, output
    from advdl_ops._conv.problem import Epilogue, convert
    from advdl_ops._conv.winograd import tile_of

    generator = torch.Generator().manual_seed(0)
    given, conv = problem.memory_format, problem.conv

    def normal(shape: tuple[int, ...], layout: str = problem.layout) -> torch.Tensor:
        is_last = layout == LAST
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        return convert(torch.randn(shape, generator=generator), memory_format)

    x, weight = normal(problem.x), normal(problem.weight, problem.weight_layout)
    if problem.direction in (FORWARD, FOLDED):
        taken: Any = weight
        if candidate.name == choice.PREPACKED:
            taken = cpu.prepack(x, weight, conv)
        elif candidate.name == choice.WINOGRAD and problem.direction == FOLDED:
            tile = tile_of(problem)
            assert tile is not None
            taken = cpu.Transformed(weight, cpu.winograd_pack(weight, problem.groups, tile), tile)
        epilogue = Epilogue(shift=torch.randn(problem.weight[0], generator=generator))
        call: Any = lambda: output(candidate, given, x, taken, conv, epilogue)  # noqa: E731
    else:
        dz = normal((problem.x[0], problem.weight[0], *problem.out_size))
        needs = problem.direction == DX, problem.direction == DWEIGHT, False
        call = lambda: gradients(candidate, given, dz, x, weight, conv, needs)  # noqa: E731
    return torch.inference_mode()(call)


for _sweep in SWEEPS:
    register(
        Case(
            name=f"choice/{_sweep.threshold}",
            suites=("choice",),
            op=_sweep.threshold,
            modes=(),
            dtype="float32",
            layout="-",
            shape=(),
            device="cpu",
            run=run,
            rounds=5,
            options={"sweep": _sweep},
        )
    )
