"""Settings that several stages share; the YAML files under ``experiments/`` fill them in."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExperimentSettings:
    """Where an experiment's inputs and outputs lie.

    Attributes:
        name: of the experiment.
        stage: that runs, whose folder in the run folder is named after it.
        scale: of the experiment: which file of ``experiments/scales`` applies.
        extends: file of ``experiments/scales`` that this one only differs from, without ``.yaml``.
        run_dir: holds one folder a stage.
        data_root: folder of the data set.
        backbone: pipeline folder, hub id, or ``asset:NAME`` for one shipped with the package.
        start: pipeline that a new backbone is trained on from.
        shipped: name of the shipped backbone that is used where none is given; the experiment's own
            name if not given.
        family: of a new backbone, one of ``invdiff_pl.utils.names.NEW_FAMILIES``.
        samples_per_prompt: drawn at each invariant scale, unless the scale has its own number.
        anchored_from: of the adapter's training, see :class:`~invdiff_pl.modules.InvariantAdapter`.
        cache_dir: latents, prompt embeddings and decoded images, shared by all runs.
    """

    name: str = "experiment"
    stage: str = ""
    scale: str = "mini"
    extends: str | None = None
    run_dir: str = "runs/experiment/mini"
    data_root: str = "data"
    backbone: str = "asset:experiment"
    start: str = "runs/experiment/mini/autoencoder/pipeline"
    shipped: str | None = None
    family: str = "sd"
    samples_per_prompt: int = 256
    anchored_from: float | None = None
    cache_dir: str = ".cache/invdiff"


@dataclass
class ScaleSettings:
    """What changes with the size of the model and the machine.

    Attributes:
        resolution: side of the images in pixels.
        train_size: of splits that are drawn by ratio; all that can be drawn if not given.
        autoencoder_steps: optimizer steps of a new backbone's autoencoder.
        autoencoder_batch: global batch of the autoencoder.
        backbone_steps: optimizer steps of the backbone.
        backbone_batch: global batch of the backbone.
        backbone_learning_rate: peak rate of the backbone.
        backbone_warmup: optimizer steps over which the backbone's rate rises to its peak.
        backbone_lora_rank: of low-rank updates that are trained instead of every weight of the
            backbone, and added to them in the end; every weight if not given.
        classifier_steps: optimizer steps of the classifier that scores samples.
        scoring_batch: images scored together.
        adapter_steps: optimizer steps of the adapter.
        adapter_batch: global batch of the adapter.
        adapter_learning_rate: peak rate of the adapter.
        adapter_warmup: optimizer steps over which the adapter's rate rises to its peak.
        adapter: kind of adapter, see ``invdiff_pl.adapters``.
        adapter_settings: of that kind.
        max_micro_batch: most samples a device and pass of training; larger shares of the global
            batch are accumulated over several passes. No limit if not given.
        gradient_checkpointing: recompute activations of training, for less memory and more time.
        compile_denoiser: let ``torch.compile`` fuse the denoiser's operations: faster after a
            minute, and equal up to rounding.
        channels_last: hold the denoiser's weights with channels in the innermost place.
        frozen_weights: how the backbone's weights are held where they are not trained, see
            ``invdiff_pl.backbones.pipeline.load_pipeline``.
        optimizer: of backbone and adapter, one of ``invdiff_pl.utils.names.OPTIMIZERS``.
        latent_device: where latents are held while they are trained on, see
            ``invdiff_pl.data.base.BiasedDataModule``.
        embedding_dtype: in which prompt embeddings are cached.
        eval_every_n_steps: optimizer steps between held-out measurements, pictures and quick looks.
        eval_samples: samples of each prompt in a quick look.
        calibration_samples: over all prompts, at each scale that is tried after training.
        calibration_steps: denoising steps of these.
        calibration_guidance: guidance scale of these.
        checkpoint_every: optimizer steps between checkpoints.
        sampling_batch: images drawn together.
        samples_per_prompt: samples drawn of each prompt at each invariant scale.
        max_samples: most samples of all prompts and scales; more are refused beforehand.
        sampling_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
    """

    resolution: int = 32
    train_size: int | None = None
    autoencoder_steps: int = 2500
    autoencoder_batch: int = 32
    backbone_steps: int = 2400
    backbone_batch: int = 64
    backbone_learning_rate: float = 1e-3
    backbone_warmup: int = 200
    backbone_lora_rank: int | None = None
    classifier_steps: int = 400
    scoring_batch: int = 128
    adapter_steps: int = 400
    adapter_batch: int = 48
    adapter_learning_rate: float = 2e-3
    adapter_warmup: int = 20
    adapter: str = "lora"
    adapter_settings: dict[str, Any] = field(default_factory=dict)
    max_micro_batch: int | None = None
    gradient_checkpointing: bool = False
    compile_denoiser: bool = False
    channels_last: bool = False
    frozen_weights: str = "float32"
    optimizer: str = "adamw"
    latent_device: str = "disk"
    embedding_dtype: str = "float32"
    eval_every_n_steps: int = 100
    eval_samples: int = 16
    calibration_samples: int = 512
    calibration_steps: int = 20
    calibration_guidance: float = 1.0
    checkpoint_every: int = 100
    sampling_batch: int = 128
    samples_per_prompt: int = 256
    max_samples: int = 120_000
    sampling_steps: int = 20
    guidance_scale: float = 1.0
