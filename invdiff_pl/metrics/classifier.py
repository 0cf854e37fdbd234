"""The network that classifies the prompt and attribute of images, used to score samples only."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_object, write_json
from invdiff_pl.utils.tensors import read_tensors, write_tensors

CONFIG_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"
SMALL = "small"


class SampleClassifier(nn.Module):
    """A classifier with one trunk and two heads, for an image's attribute class and its prompt.

    Args:
        attributes: number of attribute classes K.
        prompts: number of prompts P.
        trunk: ``small``, for images of about 32 to 128 pixels, or the name of any torchvision
            classification model, such as ``resnet18`` (the reference's).
    """

    def __init__(self, attributes: int, prompts: int, trunk: str = SMALL) -> None:
        super().__init__()
        self.trunk_name = trunk
        self.trunk, features = _small_trunk() if trunk == SMALL else _torchvision_trunk(trunk)
        self.attribute_head = nn.Linear(features, attributes)
        self.prompt_head = nn.Linear(features, prompts)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify float images ``[B, 3, H, W]`` in [-1, 1].

        Returns:
            logits of the attribute ``[B, K]`` and of the prompt ``[B, P]``.
        """
        features = self.trunk(images).flatten(1)
        return self.attribute_head(features), self.prompt_head(features)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write weights and configuration, together with further facts about the classifier."""
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        sizes = {
            "attributes": self.attribute_head.out_features,
            "prompts": self.prompt_head.out_features,
            "trunk": self.trunk_name,
        }
        write_json(folder / CONFIG_FILE, {**facts, "network": sizes})

    @classmethod
    def load(cls, folder: Path) -> tuple["SampleClassifier", dict[str, Any]]:
        """Read a classifier, frozen, and the facts saved with it.

        Raises:
            InvDiffError: if the folder holds none, or a damaged one.
        """
        facts = read_object(folder / CONFIG_FILE, network=dict)
        remedy = f"remove {folder} and rerun the classifier stage"
        weights = read_tensors(folder / WEIGHTS_FILE, remedy)
        try:
            network = cls(**facts["network"])
            network.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvDiffError(f"{folder} holds no classifier ({reason}): {remedy}.") from None
        return network.requires_grad_(False).eval(), facts


def _small_trunk() -> tuple[nn.Module, int]:
    channels = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        for inputs, stride in ((before, 1), (after, 2)):
            layers += [
                nn.Conv2d(inputs, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
    # The mean sees the scene, the maximum a small bird in it.
    layers.append(_MeanAndMaximum())
    return nn.Sequential(*layers), 2 * channels[-1]


class _MeanAndMaximum(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)


def require_trunk(name: str) -> None:
    """Refuse a name that is not a trunk's.

    Raises:
        InvDiffError: if there is no trunk of that name.
    """
    if name != SMALL and name not in models.list_models(module=models):
        raise InvDiffError(
            f"trunk={name}: torchvision has no such classification model; use {SMALL!r}, "
            "'resnet18' or another of torchvision.models.",
            "trunk",
        )


def _torchvision_trunk(name: str) -> tuple[nn.Module, int]:
    require_trunk(name)
    network = models.get_model(name, weights=None)
    last_name, last = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    parent = network.get_submodule(last_name.rpartition(".")[0])
    setattr(parent, last_name.rpartition(".")[2], nn.Identity())
    return network, last.in_features
