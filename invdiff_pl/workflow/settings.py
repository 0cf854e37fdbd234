"""Settings that several stages share; the YAML files under ``experiments/`` fill them in."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExperimentSettings:
    """Names, inputs and outputs of an experiment.

    Attributes:
        name: name of the experiment.
        stage: name of the stage that runs, and of its folder in the run folder.
        scale: scale of the experiment: which file of ``experiments/scales`` applies.
        extends: file of ``experiments/scales`` that a scale's file extends, without ``.yaml``.
        run_dir: run folder, with one folder per stage.
        data_root: folder of the data set.
        backbone: pipeline folder, hub id, or ``asset:NAME`` for one shipped with the package.
        start: pipeline from which the training of a new backbone starts.
        shipped: name of the shipped backbone that is used if none is given; the experiment's own
            name if not given.
        family: family of a new backbone, one of ``invdiff_pl.utils.names.NEW_FAMILIES``.
        samples_per_prompt: number of samples per prompt drawn at each invariant scale, unless the
            scale has its own number.
        anchored_from: setting of the adapter's training, see
            :class:`~invdiff_pl.modules.InvariantAdapter`.
        cache_dir: folder of latents, prompt embeddings and decoded images, shared by all runs.
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
        train_size: number of training images in splits drawn by ratio; as many as possible if not
            given.
        autoencoder_steps: optimizer steps of a new backbone's autoencoder.
        autoencoder_batch: global batch of the autoencoder.
        backbone_steps: optimizer steps of the backbone.
        backbone_batch: global batch of the backbone.
        backbone_learning_rate: peak rate of the backbone.
        backbone_warmup: optimizer steps over which the backbone's rate rises to its peak.
        backbone_lora_rank: rank of low-rank updates that are trained instead of every weight of the
            backbone, and added to the weights at the end; every weight is trained if not given.
        classifier_steps: optimizer steps of the classifier that scores samples.
        scoring_batch: number of images scored together.
        adapter_steps: optimizer steps of the adapter.
        adapter_batch: global batch of the adapter.
        adapter_learning_rate: peak rate of the adapter.
        adapter_warmup: optimizer steps over which the adapter's rate rises to its peak.
        adapter: kind of adapter, see ``invdiff_pl.adapters``.
        adapter_settings: settings of that kind.
        max_micro_batch: maximum number of samples per device and pass in training; larger shares of
            the global batch are accumulated over several passes. No limit if not given.
        gradient_checkpointing: recompute activations in training, which takes less memory and more
            time.
        compile_denoiser: let ``torch.compile`` fuse the denoiser's operations: faster after a
            minute, and equal up to rounding.
        channels_last: hold the denoiser's weights with the channels innermost.
        frozen_weights: how the backbone's weights are held when they are not trained, see
            ``invdiff_pl.backbones.pipeline.load_pipeline``.
        optimizer: optimizer of backbone and adapter, one of ``invdiff_pl.utils.names.OPTIMIZERS``.
        latent_device: where latents are held during training, see
            ``invdiff_pl.data.base.BiasedDataModule``.
        embedding_dtype: dtype in which prompt embeddings are cached.
        eval_every_n_steps: optimizer steps between held-out measurements, pictures and quick looks.
        eval_samples: number of samples per prompt in a quick look.
        calibration_samples: number of samples, over all prompts, at each scale that is tried after
            training.
        calibration_steps: denoising steps of these samples.
        calibration_guidance: guidance scale of these samples.
        checkpoint_every: optimizer steps between checkpoints.
        sampling_batch: number of images drawn together.
        samples_per_prompt: number of samples per prompt at each invariant scale.
        max_samples: maximum number of samples over all prompts and scales; more are refused
            beforehand.
        sampling_steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
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
