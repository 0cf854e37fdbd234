"""The rows of the ablation: what each changes in a run's settings."""

import json
from dataclasses import dataclass, field
from typing import Any

# Learning rates of adapters that are separate networks; LoRA keeps the run's. The copy's is the one
# at which the small backbones were trained.
BRANCH_RATE = 1e-3


@dataclass(frozen=True)
class Row:
    """A row of the ablation.

    Attributes:
        name: name of the row, for ``--rows``.
        says: description in the table.
        groups: environments: ``inferred`` (the run's), ``reference``, ``one``, ``random``,
            ``oracle`` or ``oracle_minority``.
        model: changed settings of ``InvariantAdapter``.
        data: changed settings of the DataModule.
        untrained: whether only the backbone is sampled.
        calibrated: whether the trained adapter's scale is calibrated, where its kind allows it.
    """

    name: str
    says: str
    groups: str = "inferred"
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False
    calibrated: bool = True

    def flags(self) -> list[str]:
        """Return the changes as flags of the Lightning command line."""
        return [
            f"--{group}.{name}={value if isinstance(value, str) else json.dumps(value)}"
            for group, settings in (("model", self.model), ("data", self.data))
            for name, value in settings.items()
        ]


# The reference's recipe except for its environments; each improvement replaces one part of it.
_COPY = {"adapter": "unet_copy", "adapter_settings": {"ratio": 0.5}, "learning_rate": BRANCH_RATE}
_UNIFORM = {"timestep_density": "uniform"}
_WHOLE = {**_COPY, **_UNIFORM, "lambda_": 1.0}


def _lora(rank: int, layers: list[str]) -> dict[str, Any]:
    return {"adapter": "lora", "adapter_settings": {"rank": rank, "layers": layers}}


def _branch(kind: str, ratio: float) -> dict[str, Any]:
    settings = {"adapter": kind, "adapter_settings": {"ratio": ratio}}
    return {**settings, "learning_rate": BRANCH_RATE}


_ALL_LAYERS = ["attention", "spatial", "time"]
SECTIONS: dict[str, list[str]] = {
    "The reference's recipe, and each improvement added to the one before": [
        "backbone",
        "reference",
        "plus_environments",
        "plus_balance",
        "plus_pairs",
        "plus_high_noise",
        "uncalibrated",
        "ours",
    ],
    "Environments": ["no_groups", "random_groups", "ours", "oracle", "oracle_minority"],
    "Objectives and timesteps": [
        "ours",
        "unpaired",
        "reweighting",
        "population_variance",
        "group_dro",
        "lambda_01",
        "lambda_10",
        "uniform_timesteps",
        "min_snr",
        "anchored",
    ],
    "Adapters": [
        "lora_1",
        "ours",
        "lora_10",
        "small_unet_3",
        "small_unet_10",
        "small_unet_25",
        "bottleneck_3",
        "bottleneck_10",
    ],
}
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("backbone", "backbone alone", untrained=True),
        Row(
            "reference",
            "reference, whole: its scores, soft groups, random batches, blended copy",
            "reference",
            _WHOLE,
            {"batches": "shuffled", "soft_environments": True},
        ),
        Row(
            "plus_environments",
            "+ environments from common noises, exact partition",
            "inferred",
            _WHOLE,
            {"batches": "shuffled"},
        ),
        Row("plus_balance", "+ balanced batches", "inferred", _WHOLE, {"batches": "balanced"}),
        Row("plus_pairs", "+ paired draws", "inferred", _WHOLE),
        Row("plus_high_noise", "+ timesteps towards high noise", "inferred", _COPY),
        Row("uncalibrated", "+ additive LoRA, a no-op at first", calibrated=False),
        Row("ours", "+ calibrated scale: the run's own settings"),
        Row("no_groups", "no groups: one environment", "one"),
        Row("random_groups", "random groups of the inferred ones' sizes", "random"),
        Row("oracle", "oracle: attribute values (labels: NOT available to a user)", "oracle"),
        Row(
            "oracle_minority",
            "oracle: with or against the bias (labels: NOT available to a user)",
            "oracle_minority",
        ),
        Row("unpaired", "unpaired: a draw of its own for each image", data={"batches": "balanced"}),
        Row("reweighting", "re-weighting: no penalty", model={"objective": "reweighting"}),
        Row(
            "population_variance",
            "population variance",
            model={"objective": "population_variance"},
        ),
        Row("group_dro", "group-DRO", model={"objective": "group_dro"}),
        Row("lambda_01", "lambda = 0.1", model={"lambda_": 0.1}),
        Row("lambda_10", "lambda = 10", model={"lambda_": 10.0}),
        Row("uniform_timesteps", "uniform timesteps", model=_UNIFORM),
        Row(
            "min_snr",
            "uniform timesteps, min-SNR weighting",
            model={**_UNIFORM, "loss_weighting": "min_snr"},
        ),
        Row("anchored", "anchored to the frozen prediction", model={"anchored_from": -2.0}),
        Row("lora_1", "LoRA, about 1 % (attention only)", model=_lora(2, ["attention"])),
        Row("lora_10", "LoRA, about 10 %", model=_lora(7, _ALL_LAYERS)),
        Row("small_unet_3", "small UNet, at most 3 %", model=_branch("small_unet", 0.03)),
        Row("small_unet_10", "small UNet, at most 10 %", model=_branch("small_unet", 0.1)),
        Row("small_unet_25", "small UNet, at most 25 %", model=_branch("small_unet", 0.25)),
        Row("bottleneck_3", "bottleneck, at most 3 %", model=_branch("bottleneck", 0.03)),
        Row("bottleneck_10", "bottleneck, at most 10 %", model=_branch("bottleneck", 0.1)),
    )
}
