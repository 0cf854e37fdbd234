"""Thin LightningModules, one per stage."""

from invdiff_pl.modules.attribute_classifier import AttributeClassifier
from invdiff_pl.modules.augmented_classifier import AugmentedClassifier
from invdiff_pl.modules.autoencoder import Autoencoder
from invdiff_pl.modules.backbone import Backbone
from invdiff_pl.modules.conditional_sampler import ConditionalSampler
from invdiff_pl.modules.environment_inference import EnvironmentInference
from invdiff_pl.modules.image_generation import ImageGeneration
from invdiff_pl.modules.invariant_adapter import InvariantAdapter

__all__ = [
    "AttributeClassifier",
    "AugmentedClassifier",
    "Autoencoder",
    "Backbone",
    "ConditionalSampler",
    "EnvironmentInference",
    "ImageGeneration",
    "InvariantAdapter",
]
