"""The Lightning command line: interpolation, precedence, and messages of one line."""

from dataclasses import asdict
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml

from invdiff_pl.cli import lightning as cli
from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.experiment import scale_files
from invdiff_pl.workflow.settings import ScaleSettings

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = ["waterbirds.yaml", "base.yaml"]
SCALES = sorted(path.stem for path in (EXPERIMENTS / "scales").glob("*.yaml"))
STAGES = sorted(path.stem for path in (EXPERIMENTS / "stages").glob("*.yaml"))
COMMANDS = {"environments": "predict", "samples": "predict", "backbone_samples": "predict"}


class _ParsedError(Exception):
    """Carries a parsed configuration out of the command line."""


def _arguments(stage: str, *flags: str, scale: str = "mini") -> list[str]:
    first = "prompts.yaml" if stage == "data" else FILES[0]  # drawn of prompts, without a data set
    scales = scale_files(scale, EXPERIMENTS)
    files = [first, *FILES[1:], *scales, f"stages/{stage}.yaml"]
    configs = [f"--config={EXPERIMENTS / name}" for name in files]
    return [COMMANDS.get(stage, "fit"), *configs, *flags]


def _parsed(monkeypatch: pytest.MonkeyPatch, stage: str, *flags: str, scale: str = "mini") -> dict:
    def stop(self: cli.InvDiffCLI) -> None:
        raise _ParsedError(self.config[self.config.subcommand].as_dict())

    monkeypatch.setattr(cli.InvDiffCLI, "before_instantiate_classes", stop)
    command, *given = _arguments(stage, *flags, scale=scale)
    with pytest.raises(_ParsedError) as stopped:
        cli.run_lightning(command, given)
    config: dict = stopped.value.args[0]
    return config


@pytest.mark.parametrize(
    ("stage", "scale"), [*((stage, "mini") for stage in STAGES), ("environments", "sd14")]
)
def test_every_shipped_stage_parses(stage: str, scale: str) -> None:
    cli.check(_arguments(stage, scale=scale))


def test_a_flag_reaches_every_interpolation_across_files(monkeypatch) -> None:
    config = _parsed(
        monkeypatch,
        "adapter",
        "--experiment.run_dir=elsewhere",
        "--scale.adapter_steps=7",
        "--seed_everything=5",
    )
    assert config["trainer"]["max_steps"] == 7
    saving = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("SaveAdapter")]
    assert [c["init_args"]["output"] for c in saving] == ["elsewhere/adapter"]
    assert config["data"]["init_args"]["environments"] == "elsewhere/environments"
    assert config["data"]["init_args"]["root"] == "elsewhere/data/images"
    assert config["model"]["init_args"]["seed"] == 5


def test_a_later_file_wins_and_interpolations_follow_it(monkeypatch, tmp_path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("experiment:\n  name: sparrows\nscale:\n  resolution: 64\n")
    config = _parsed(monkeypatch, "adapter", f"--config={later}")
    assert config["experiment"]["run_dir"] == "runs/sparrows/mini"
    assert config["data"]["init_args"]["resolution"] == 64


def test_environment_variables_are_resolved(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("INVDIFF_TEST_STEPS", "11")
    later = tmp_path / "later.yaml"
    later.write_text("scale:\n  adapter_steps: ${oc.decode:${oc.env:INVDIFF_TEST_STEPS}}\n")
    config = _parsed(monkeypatch, "adapter", f"--config={later}")
    assert config["trainer"]["max_steps"] == 11


def test_flags_win_over_a_checkpoints_settings(monkeypatch, tmp_path) -> None:
    import torch

    checkpoint = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": {"lambda_": 99.0}}, checkpoint)
    config = _parsed(monkeypatch, "adapter", "--model.lambda_=2", f"--ckpt_path={checkpoint}")
    assert config["model"]["init_args"]["lambda_"] == 2.0


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.lamda_=1", "lamda_"),
        ("--model.lambda_=much", "much"),
        ("--trainer.max_step=1", "max_step"),
        ("--data.rot=1", "rot"),
        ("--scale.steps=1", "steps"),
        ("--config=missing.yaml", "missing.yaml"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flag: str, named: str, capsys) -> None:
    assert main(_arguments("adapter", flag)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert named in message


@pytest.mark.parametrize(
    ("stage", "flag", "named"),
    [
        ("adapter", "--experiment.backbone=/nowhere", "/nowhere"),
        ("adapter", "--model.adapter=loraa", "--model.adapter=loraa: there is no such adapter"),
        (
            "adapter",
            "--model.loss_weighting=snr",
            "--model.loss_weighting=snr: expected one of none, min",
        ),
        ("adapter", "--model.objective_settings.size=1", "--model.objective_settings: ['size']"),
        ("adapter", "--scale.max_micro_batch=0", "--scale.max_micro_batch=0: expected at"),
        ("adapter", "--scale.calibration_samples=-1", "--scale.calibration_samples=-1: "),
        ("adapter", "--trainer.max_steps=-5", "Trainer cannot be built (MisconfigurationExc"),
        ("adapter", "--model.lambda_=${nope}", "nope"),
        ("adapter", "--seed_everything=-1", "2^32"),
        ("environments", "--model.inference=x", "--model.inference=x: expected one of mixture"),
        ("environments", "--model.features=x", "--model.features=x: expected block, losses"),
        ("environments", "--model.levels=[]", "--model.levels=[]: expected logarithms"),
        ("samples", "--model.scheduler=x", "--model.scheduler=x: diffusers has no"),
        ("classifier", "--model.trunk=x", "--model.trunk=x: torchvision has no"),
    ],
)
def test_what_a_constructor_refuses_is_told_in_one_line(
    stage: str, flag: str, named: str, capsys, tmp_path
) -> None:
    assert main(_arguments(stage, flag, f"--experiment.run_dir={tmp_path}/run")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert named in message
    assert "Union" not in message
    assert not (tmp_path / "run").exists()


class Failing(pl.Callback):
    """A callback of somebody's own, with a bug in it."""

    def __init__(self) -> None:
        raise KeyError("something")


def test_any_exception_of_a_constructor_is_told_with_its_place(capsys, tmp_path) -> None:
    flags = (f"--trainer.callbacks+={__name__}.Failing", f"--experiment.run_dir={tmp_path}/run")
    assert main(_arguments("classifier", *flags)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: Failing cannot be built (KeyError: 'something'; test_cli.py,")
    assert message.count("\n") == 1


@pytest.mark.parametrize("flag", ["--data.val_share=2", "--model.lambda_=-1"])
def test_checking_refuses_what_building_would(flag: str) -> None:
    files = ["custom.yaml", "base.yaml", "scales/mini.yaml", "stages/adapter.yaml"]
    configs = [f"--config={EXPERIMENTS / name}" for name in files]
    cli.check(["fit", *configs])
    with pytest.raises(InvDiffError, match=flag.partition("=")[0]):
        cli.check(["fit", *configs, flag])


@pytest.mark.parametrize("scale", SCALES)
def test_scale_files_hold_what_differs_from_the_defaults_alone(scale: str) -> None:
    content = yaml.safe_load((EXPERIMENTS / "scales" / f"{scale}.yaml").read_text())
    defaults = asdict(ScaleSettings())
    assert all(value != defaults[name] for name, value in content["scale"].items())
    assert content["experiment"]["scale"] == scale


def test_the_reference_scale_has_the_published_schedule(monkeypatch) -> None:
    for stage in ("backbone", "adapter"):
        config = _parsed(monkeypatch, stage, scale="sd14-reference")
        model = config["model"]["init_args"]
        assert config["trainer"]["max_steps"] == 10_000
        assert config["data"]["init_args"]["batch_size"] == 64
        assert config["data"]["init_args"]["resolution"] == 512
        assert (model["learning_rate"], model["warmup_steps"]) == (1e-4, 1000)
    assert model["lambda_"] == 1.0


def test_sampling_at_the_large_scale_is_guided_and_takes_the_backbones_own_scheduler(
    monkeypatch,
) -> None:
    model = _parsed(monkeypatch, "samples", scale="sd14")["model"]["init_args"]
    assert (model["steps"], model["guidance_scale"], model["scheduler"]) == (50, 7.5, None)


def test_flags_change_one_setting_of_the_scales_adapter(monkeypatch) -> None:
    flags = ("--scale.adapter=small_unet", "--scale.adapter_settings={}")
    model = _parsed(monkeypatch, "adapter", *flags, scale="sd14")["model"]["init_args"]
    assert (model["adapter"], model["adapter_settings"]) == ("small_unet", {})
    flag = "--model.adapter_settings.rank=4"
    model = _parsed(monkeypatch, "adapter", flag, scale="sd14")["model"]["init_args"]
    assert (model["adapter"], model["adapter_settings"]) == ("lora", {"rank": 4})
