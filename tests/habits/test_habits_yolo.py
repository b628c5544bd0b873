"""A detector in the style of YOLO: its blocks, and what its training and export scripts do to a model."""

import copy

import pytest
import torch

import advdl_ops

f64 = torch.float64


class Conv(torch.nn.Module):
    """Convolution, norm and SiLU; ``forward_fuse`` takes over when the norm is folded."""

    default_act = torch.nn.SiLU()

    def __init__(self, c1, c2, k=1, s=1, g=1, act=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = torch.nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else torch.nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Bottleneck(torch.nn.Module):
    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c, 3), Conv(c, c, 3), shortcut

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(torch.nn.Module):
    def __init__(self, c1, c2, n, shortcut):
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, c2), Conv((2 + n) * self.c, c2)
        self.m = torch.nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2), Conv(c * 2, c)
        self.m = torch.nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(torch.nn.Module):
    """Anchors in a buffer, and a grid that is made anew when the size of the image changes."""

    def __init__(self, classes, channels):
        super().__init__()
        self.no, self.na, self.export = classes + 5, 2, False
        self.grid = [torch.empty(0)] * len(channels)
        anchors = torch.arange(1.0, 1 + 4 * len(channels)).view(len(channels), 2, 2)
        self.register_buffer("anchors", anchors)
        self.m = torch.nn.ModuleList(torch.nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.inplace = True

    def forward(self, xs):
        out = []
        for i, x in enumerate(xs):
            x = self.m[i](x)
            n, _, h, w = x.shape
            x = x.view(n, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            if self.training:
                out.append(x)
                continue
            if self.grid[i].shape[2:4] != x.shape[2:4]:
                ys, xs_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                self.grid[i] = torch.stack((xs_, ys), 2).view(1, 1, h, w, 2).to(x)
            y = x.sigmoid()
            if self.inplace:
                y[..., 0:2] = y[..., 0:2] * 2 - 0.5 + self.grid[i]
                y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.anchors[i].view(1, self.na, 1, 1, 2)
            else:
                xy = y[..., 0:2] * 2 - 0.5 + self.grid[i]
                wh = (y[..., 2:4] * 2) ** 2 * self.anchors[i].view(1, self.na, 1, 1, 2)
                y = torch.cat((xy, wh, y[..., 4:]), -1)
            out.append(y.view(n, -1, self.no))
        return out if self.training else torch.cat(out, 1)


class Yolo(torch.nn.Module):
    """Layers in one list with the index of their input, as the models built from a YAML file."""

    def __init__(self, classes=3):
        super().__init__()
        layers = [
            (-1, Conv(3, 8, 3, 2)),
            (-1, Conv(8, 16, 3, 2)),
            (-1, C2f(16, 16, 1, True)),
            (-1, Conv(16, 32, 3, 2)),
            (-1, SPPF(32)),
            (-1, torch.nn.Upsample(None, 2, "nearest")),
            ([-1, 2], Concat()),
            (-1, C2f(48, 16, 1, False)),
            ([7, 4], Detect(classes, (16, 32))),
        ]
        self.model = torch.nn.Sequential(*(layer for _, layer in layers))
        for layer, (source, _) in zip(self.model, layers, strict=True):
            layer.f = source
        for m in self.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(m.running_var, 0.5, 2)
                torch.nn.init.normal_(m.running_mean)

    def forward(self, x):
        kept = []
        for m in self.model:
            if m.f != -1:
                x = [x if j == -1 else kept[j] for j in m.f]
            x = m(x)
            kept.append(x)
        return x

    def fuse(self):
        for m in self.modules():
            if isinstance(m, Conv) and hasattr(m, "bn"):
                m.conv = folded(m.conv, m.bn)
                delattr(m, "bn")
                m.forward = m.forward_fuse
        return self


class Concat(torch.nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


def folded(conv, bn):
    made = torch.nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        groups=conv.groups, bias=True,
    ).requires_grad_(False).to(conv.weight)  # fmt: skip
    scale = bn.weight / torch.sqrt(bn.eps + bn.running_var)
    made.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    made.bias.copy_(bn.bias - bn.running_mean * scale)
    return made


@pytest.fixture
def pair():
    torch.manual_seed(0)
    stock = Yolo().to(f64)
    return stock, advdl_ops.optimize(copy.deepcopy(stock))


def outputs(model, x):
    out = model(x)
    return out if isinstance(out, list) else [out]


def compare(stock, fast, x, **tolerance):
    for expected, found in zip(outputs(stock, x), outputs(fast, x), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def test_blocks_are_fused(pair):
    fused = advdl_ops.explain(pair[1], as_dict=True)["fused"]
    assert sum("conv + bn + act" in name for name in fused) == 13, fused


def test_training_steps(pair):
    x = torch.randn(2, 3, 32, 48, dtype=f64)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in pair]
    for _ in range(3):
        for model, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            sum(out.square().mean() for out in outputs(model.train(), x)).backward()
            optimizer.step()
    compare(*pair, x)
    for (name, expected), found in zip(
        pair[0].state_dict().items(), pair[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_initialization_of_norms_and_activations(pair):
    """``initialize_weights`` of these projects, called on a model that is optimized already."""
    x = torch.randn(2, 3, 32, 32, dtype=f64)
    for model in pair:
        model(x)
        for m in model.modules():
            if type(m) is torch.nn.BatchNorm2d or isinstance(m, torch.nn.BatchNorm2d):
                m.eps, m.momentum = 1e-3, 0.03
            elif isinstance(m, torch.nn.SiLU | torch.nn.ReLU):
                m.inplace = True
    compare(*pair, x)
    compare(*(model.eval() for model in pair), x)


@pytest.mark.parametrize("inplace", [True, False])
def test_evaluation_at_several_sizes(pair, inplace):
    for model in pair:
        model.eval().model[-1].inplace = inplace
    with torch.no_grad():
        for size in ((32, 32), (64, 48), (32, 32)):
            compare(*pair, torch.randn(1, 3, *size, dtype=f64))


@torch.no_grad()
def test_fused_by_the_users_code(pair):
    x = torch.randn(1, 3, 32, 32, dtype=f64)
    before = [out.clone() for out in outputs(pair[0].eval(), x)]
    compare(*(model.eval() for model in pair), x)
    for model in pair:
        model.fuse()
    compare(*pair, x)
    for expected, found in zip(before, outputs(pair[1], x), strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_optimized_after_fuse():
    torch.manual_seed(0)
    stock = Yolo().eval().fuse()
    x = torch.randn(1, 3, 32, 32)
    compare(stock, advdl_ops.optimize(copy.deepcopy(stock)), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ema_and_half(pair):
    fast = pair[1].eval()
    ema = copy.deepcopy(fast)
    for average, value in zip(
        ema.state_dict().values(), pair[0].state_dict().values(), strict=True
    ):
        if average.is_floating_point():
            average.mul_(0.9).add_(value, alpha=0.1)
    compare(pair[0].eval(), ema, torch.randn(1, 3, 32, 32, dtype=f64))
    half = fast.bfloat16()
    out = half(torch.randn(1, 3, 32, 32).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
