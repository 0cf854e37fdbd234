"""The stages of an experiment: their commands, what they depend on, and the plans they form."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One step of an experiment, which writes the folder of its name in the run folder.

    Attributes:
        name: name of the stage, its YAML file and its folder.
        command: subcommand of ``python -m invdiff_pl``.
        needs: stages whose output it reads.
        reads_backbone: whether it reads the experiment's backbone.
        explains: explanation for the user, in one line.
        code: rooms and files of the package that its result depends on; of ``callbacks``, only
            those that change it.
        one_device: whether it runs on one device even if the others run on several: batch
            normalisation would make its result depend on their number.
    """

    name: str
    command: str
    needs: tuple[str, ...]
    reads_backbone: bool
    explains: str
    code: tuple[str, ...] = ()
    one_device: bool = False


# Rooms of stages that train beside a frozen denoiser or sample with it.
_DIFFUSION = ("adapters", "backbones", "callbacks", "data", "modules")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", "render", (), False, "draw the stand-in pictures", ("data/synthetic",)),
        Stage(
            "autoencoder",
            "fit",
            ("data",),
            False,
            "train a new backbone's autoencoder",
            ("backbones", "callbacks/save.py", "data", "modules"),
        ),
        Stage(
            "backbone", "fit", ("data", "autoencoder"), False, "train a new backbone", _DIFFUSION
        ),
        Stage(
            "classifier",
            "fit",
            ("data",),
            False,
            "train the classifier that scores samples",
            ("callbacks/save.py", "data", "metrics/classifier.py", "modules"),
            one_device=True,
        ),
        Stage(
            "backbone_samples",
            "predict",
            ("data", "classifier", "backbone"),
            False,
            "sample the new backbone and measure its bias",
            (*_DIFFUSION, "metrics"),
        ),
        Stage(
            "card",
            "card",
            ("backbone_samples",),
            False,
            "write the new backbone's model card",
            ("report",),
        ),
        Stage(
            "environments",
            "predict",
            ("data",),
            True,
            "infer environments without labels",
            (
                *("backbones", "data", "environments", "modules"),
                *("callbacks/environments.py", "metrics/intervals.py", "metrics/clip.py"),
            ),
        ),
        Stage(
            "adapter",
            "fit",
            ("data", "environments"),
            True,
            "train the invariant adapter",
            (*_DIFFUSION, "objectives"),
        ),
        Stage(
            "samples",
            "predict",
            ("data", "classifier", "adapter"),
            True,
            "sample before and after, and score the samples",
            (*_DIFFUSION, "metrics"),
        ),
        Stage(
            "augmentation",
            "fit",
            ("data", "samples"),
            False,
            "train a classifier with debiased samples, and test its worst group",
            ("callbacks/group_accuracy.py", "data", "metrics", "modules"),
        ),
        Stage(
            "report",
            "report",
            ("environments", "samples"),
            False,
            "write tables and pictures",
            ("metrics", "report"),
        ),
    )
}
# Replaces ``data`` if the images are drawn from prompts.
GENERATED = Stage(
    "data",
    "predict",
    (),
    True,
    "draw images of the prompts with the frozen model",
    ("backbones", "callbacks/samples.py", "data", "environments", "modules"),
)
PLANS = {
    "train": ("data", "classifier", "environments", "adapter", "samples", "report"),
    "augment": (
        *("data", "classifier", "environments", "adapter", "samples"),
        *("augmentation", "report"),
    ),
    "backbone": ("data", "autoencoder", "backbone", "classifier", "backbone_samples", "card"),
}
# Flags without a stage's name go to the stage that a command is about.
MAIN_STAGE = {"train": "adapter", "augment": "adapter", "backbone": "backbone"}
LIGHTNING = ("fit", "predict")
ONE_DEVICE = ("--trainer.devices=1", "--trainer.num_nodes=1")
