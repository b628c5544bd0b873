"""Model zoo: names, `state_dict` keys and numerics of the public originals, layers from `advdl_ops.nn`."""

from advdl_ops.models._registry import create_model, list_models, register_model
from advdl_ops.models._weights import load_weights
from advdl_ops.models.convnet import ConvNet, convnet
from advdl_ops.models.deeplabv3 import DeepLabV3, deeplabv3_resnet50, deeplabv3_resnet101
from advdl_ops.models.fcn import FCN, fcn_resnet50
from advdl_ops.models.fcn_dilated import FCNDilated, fcn_dilated
from advdl_ops.models.lstm_classifier import LSTMClassifier, lstm_classifier
from advdl_ops.models.lstm_lm import LSTMLM, lstm_lm
from advdl_ops.models.lstm_tagger import LSTMTagger, lstm_tagger
from advdl_ops.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)
from advdl_ops.models.unet import UNet, unet
from advdl_ops.models.unet_resnet import UNetResNet, unet_resnet18, unet_resnet34, unet_resnet50

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvNet",
    "DeepLabV3",
    "FCN",
    "FCNDilated",
    "LSTMClassifier",
    "LSTMLM",
    "LSTMTagger",
    "ResNet",
    "UNet",
    "UNetResNet",
    "convnet",
    "create_model",
    "deeplabv3_resnet101",
    "deeplabv3_resnet50",
    "fcn_dilated",
    "fcn_resnet50",
    "list_models",
    "load_weights",
    "lstm_classifier",
    "lstm_lm",
    "lstm_tagger",
    "register_model",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "unet",
    "unet_resnet18",
    "unet_resnet34",
    "unet_resnet50",
    "wide_resnet50_2",
]
