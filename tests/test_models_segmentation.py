"""FCN and DeepLabV3: what every model must do, and torchvision's models, in fp64."""

from typing import ClassVar

import pytest
import torch
from models_base import ModelTester, random_input, randomize, relative_error
from test_models_unet import assert_refused
from torchvision_stub import torchvision_models

from advdl_ops import models, nn

NAMES = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_resnet101"]


def shallow(model):
    """One block per stage, in place: all that a test needs which knows these networks' parts from elsewhere."""
    for stage in (model.backbone.layer1, model.backbone.layer2):
        del stage[1:]
    # Of the dilated stages the first block still has the rate before: two.
    for stage in (model.backbone.layer3, model.backbone.layer4):
        del stage[2:]
    return model


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class SegmentationTester(ModelTester):
    input_shape = (2, 3, 24, 17)
    odd_shapes = ((1, 3, 33, 47), (2, 3, 1, 1), (1, 3, 7, 50))

    def make(self, dtype=torch.float64, **options):
        # Two calls must agree in training.
        return without_dropout(shallow(super().make(dtype, **options)))

    def scores(self, output):
        return torch.cat(list(output.values()), 1)

    def output_shape(self, shape):
        outputs = 2 if self.options.get("aux_loss") else 1
        return (shape[0], outputs * self.num_classes, *shape[2:])


class TestFCNResNet50(SegmentationTester):
    name = "fcn_resnet50"
    options: ClassVar = {"aux_loss": True}


class TestDeepLabV3ResNet50(SegmentationTester):
    name = "deeplabv3_resnet50"


class TestDeepLabV3ResNet101(SegmentationTester):
    name = "deeplabv3_resnet101"
    input_shape = (2, 1, 24, 17)
    odd_shapes = ((1, 1, 33, 47), (2, 1, 1, 1), (1, 1, 7, 50))
    options: ClassVar = {"aux_loss": True, "norm": "group", "in_channels": 1}
