"""Training the adapter: cuts of the batch, held-out selection, no bias found, every kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from birds_data import birds_data
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from trainers import adapter_trainer

from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.callbacks import ExponentialMovingAverage, HeldOutSelection
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.objectives import build_rule
from invdiff_pl.objectives.heldout import HeldOutObjective
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

STEPS = 4


@pytest.fixture(scope="module")
def place(birds: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and an environments folder whose second environment is every fifth image."""
    folder = tmp_path_factory.mktemp("training")
    data = _data(birds, tiny_backbone, folder)
    data.prepare_data()
    _write_environments(folder, len(data.index.rows("train")))
    return folder


def _write_environments(folder: Path, count: int, **facts: Any) -> None:
    (folder / "environments").mkdir(exist_ok=True)
    assignments = (torch.arange(count) % 5 == 0).long()
    soft = 0.2 + 0.6 * torch.nn.functional.one_hot(assignments, 2)
    tensors = {"assignments": assignments, "memberships": soft.float()}
    save_file(tensors, folder / "environments" / "environments.safetensors")
    (folder / "environments" / "environments.json").write_text(json.dumps(facts))


def _data(root: Path, backbone: Path, place: Path, **settings: Any) -> WaterbirdsDataModule:
    chosen = {"environments": str(place / "environments"), "batch_size": 16, **settings}
    return birds_data(root, backbone, place / "cache", **chosen)


def _fit(
    module: InvariantAdapter, data: WaterbirdsDataModule, folder: Path, **settings: Any
) -> pl.Trainer:
    resume = settings.pop("resume", None)
    trainer = adapter_trainer(folder, **{"max_steps": STEPS, **settings})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def _module(backbone: Path, **settings: Any) -> InvariantAdapter:
    chosen = {"learning_rate": 0.01, "warmup_steps": 1, **settings}
    return InvariantAdapter(str(backbone), **chosen)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


class _Gradients(pl.Callback):
    """Keeps the gradients of the first step, in a file: ranks are processes of their own."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.trainable_parameters().items()
        if trainer.is_global_zero:
            save_file({name: value.grad.clone() for name, value in named}, self.file)


@pytest.mark.parametrize(
    ("objective", "batches"), [("variance", "shuffled"), ("group_dro", "paired")]
)
def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(
    objective, batches, birds, tiny_backbone, place, tmp_path
) -> None:
    results = []
    for parts in (1, 2):
        module = _module(tiny_backbone, objective=objective, lambda_=10.0)
        data = _data(birds, tiny_backbone, place, batches=batches, soft_environments=True)
        gradients = tmp_path / f"{parts}.safetensors"
        _fit(
            module,
            data,
            tmp_path,
            max_steps=1,
            accumulate_grad_batches=parts,
            callbacks=[_Gradients(gradients)],
        )
        results.append((load_file(gradients), module.rule.state_dict()))
    (whole, rule), (parts_sum, parts_rule) = results
    assert any(value.any() for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(parts_sum[name], value, rtol=1e-4, atol=1e-5)
    for name, value in rule.items():
        torch.testing.assert_close(parts_rule[name], value)
        assert not torch.equal(value, torch.zeros_like(value))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_have_the_gradient_of_the_whole_batch(
    parts, birds, tiny_backbone, place, tmp_path
) -> None:
    results = []
    for ranks in (1, 2):
        module = _module(tiny_backbone, lambda_=10.0)
        gradients = tmp_path / f"{ranks}.safetensors"
        _fit(
            module,
            _data(birds, tiny_backbone, place),
            tmp_path,
            max_steps=1,
            accumulate_grad_batches=parts if ranks == 2 else 1,
            callbacks=[
                _Gradients(gradients),
                HeldOutSelection(images=12, bins=2, output=str(tmp_path)),
            ],
            ranks=ranks,
        )
        results.append((load_file(gradients), read_json(tmp_path / "heldout.json")))
    (one, held), (two, held_by_two) = results
    assert any(value.any() for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    before, before_by_two = (h["bins"][1]["before"]["risks"] for h in (held, held_by_two))
    assert before == pytest.approx(before_by_two, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("small_unet", {"ratio": 0.5}), ("bottleneck", {"ratio": 0.2}), ("unet_copy", {})],
)
def test_every_kind_trains_beside_a_backbone_that_stays_as_it_is(
    kind, settings, birds, tiny_backbone, place, tmp_path
) -> None:
    module = _module(tiny_backbone, adapter=kind, adapter_settings=settings)
    frozen = {name: value.clone() for name, value in module.adapter.frozen_weights().items()}
    start = {name: value.clone() for name, value in module.trainable_parameters().items()}
    data = _data(birds, tiny_backbone, place, batches="balanced", soft_environments=True)
    checkpoint = tmp_path / "checkpoints"
    callback = ModelCheckpoint(checkpoint, filename="last", every_n_train_steps=2, save_top_k=-1)
    _fit(module, data, tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[callback])
    after, trained = module.adapter.frozen_weights(), module.trainable_parameters()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert any(not torch.equal(trained[name], value) for name, value in start.items())
    state = torch.load(checkpoint / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(value.numel() for value in state.values()) == module.adapter.size()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_training_in_bf16_with_gradient_checkpointing_moves_the_adapter(
    precision, birds, tiny_backbone, place, tmp_path
) -> None:
    module = _module(tiny_backbone, gradient_checkpointing=True)
    data = _data(birds, tiny_backbone, place)
    selection = HeldOutSelection(images=12, bins=2, output=str(tmp_path))
    _fit(module, data, tmp_path, max_steps=2, precision=precision, callbacks=[selection])
    weights = _weights(tmp_path)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert any(value.any() for name, value in weights.items() if "lora.up" in name or "_B" in name)
    candidates = read_json(tmp_path / "heldout.json")["selection"]["candidates"]
    assert [candidate["step"] for candidate in candidates] == [0, 2]


@pytest.mark.parametrize(
    ("found", "told"), [(False, "found no bias"), (None, "did not test for a bias (too few)")]
)
def test_without_a_bias_that_was_found_the_adapter_stays_a_no_op_unless_forced(
    found, told, birds, tiny_backbone, place, tmp_path, capsys
) -> None:
    other = tmp_path / "unbiased"
    shutil.copytree(place, other)
    count = len(_data(birds, tiny_backbone, other).index.rows("train"))
    reason = "too few." if found is None else None
    _write_environments(other, count, bias_found=found, reason=reason)
    data = _data(birds, tiny_backbone, other)
    module = _module(tiny_backbone)
    trainer = _fit(
        module,
        data,
        tmp_path / "adapter",
        callbacks=[HeldOutSelection(output=str(tmp_path / "adapter"))],
    )
    assert trainer.global_step == 0
    assert capsys.readouterr().out.count(told) == 1
    facts = read_json(tmp_path / "adapter" / "adapter" / "adapter.json")
    assert facts["trained"] is False
    assert told in facts["reason"]
    ups = {n: v for n, v in _weights(tmp_path / "adapter").items() if "lora.up" in n or "_B" in n}
    assert ups
    assert all(not value.any() for value in ups.values())
    held = read_json(tmp_path / "adapter" / "heldout.json")
    assert all(row["before"] == row["after"] for row in held["bins"])

    module = _module(tiny_backbone, train_without_bias=True)
    assert _fit(module, data, tmp_path / "forced").global_step == STEPS
    assert read_json(tmp_path / "forced" / "adapter" / "adapter.json")["trained"] is True


def _selected(
    birds: Path, backbone: Path, place: Path, folder: Path, **settings: Any
) -> tuple[InvariantAdapter, HeldOutSelection]:
    module = _module(backbone)
    selection = HeldOutSelection(every_n_steps=2, images=24, bins=4, output=str(folder))
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    _fit(
        module,
        _data(birds, backbone, place, held_out=0.2),
        folder,
        enable_checkpointing=True,
        callbacks=[ExponentialMovingAverage(0.5), selection, checkpoints],
        **settings,
    )
    return module, selection


def test_the_weights_that_held_out_risks_choose_become_the_result(
    birds, tiny_backbone, place, tmp_path
) -> None:
    module, selection = _selected(birds, tiny_backbone, place, tmp_path)
    held = read_json(tmp_path / "heldout.json")
    candidates = {c["step"]: c for c in held["selection"]["candidates"]}
    assert list(candidates) == [0, 2, 4]
    chosen = candidates[held["selection"]["chosen_step"]]
    # Measured again, the weights in place give the value and the rows that were told.
    assert module.trainer is not None
    losses = selection._measured_losses(module.trainer, module)
    assert selection._objective.value(losses) == pytest.approx(chosen["value"], rel=1e-9)
    for number, told in enumerate(held["bins"]):
        risks = losses[:, number] @ selection._objective.weights
        assert told["after"]["risks"] == pytest.approx(risks.tolist(), rel=1e-6)
        assert told["after"]["worst"] <= told["after"]["bound"] + 1e-9
    assert sum(row["share_of_draws"] for row in held["bins"]) == pytest.approx(1)


class _Given(HeldOutSelection):
    """Takes in losses that are handed to it."""

    def __init__(self, cells: torch.Tensor) -> None:
        super().__init__(bins=1)
        weights = torch.nn.functional.one_hot(cells, 2).double()
        share, rule = torch.ones(1, dtype=torch.float64), build_rule("reweighting", 2, 1.0)
        self._objective = HeldOutObjective(weights / weights.sum(0), cells, share, rule)
        self._timesteps = torch.full((len(cells), 1), 500)


def test_the_last_step_within_a_standard_error_of_the_lowest_is_kept(
    tiny_backbone, tmp_path
) -> None:
    module = _module(tiny_backbone)
    start = torch.tensor([[4.0], [6.0], [5.0], [9.0]], dtype=torch.float64)
    spread = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    selection = _Given(torch.tensor([0, 0, 1, 1]))
    (parameter, *_) = module.trainable_parameters().values()
    for step, losses in {
        0: start,
        10: start - 3,  # lowest
        20: start - 3 + 0.1 + spread,  # higher by less than its error
        30: start - 2.9,  # as much higher, by all images alike: without error
        40: start - 1 + spread,
    }.items():
        torch.nn.init.constant_(parameter, float(step))
        selection._consider(step, losses, module)
    assert selection._chosen_step == 20
    assert next(iter(selection._kept.values())).unique().tolist() == [20.0]
    errors = [candidate["standard_error"] for candidate in selection._candidates]
    assert errors == pytest.approx([0, 0, 2**-0.5, 0, 2**-0.5])


def test_selection_resumed_from_a_checkpoint_ends_as_the_undisturbed_one(
    birds, tiny_backbone, place, tmp_path
) -> None:
    _selected(birds, tiny_backbone, place, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=2.ckpt"
    _selected(birds, tiny_backbone, place, tmp_path / "resumed", resume=checkpoint)
    first, second = (_weights(tmp_path / name) for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = [(tmp_path / name / "heldout.json").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


def test_held_out_images_are_never_trained_on(birds, tiny_backbone, place, tmp_path) -> None:
    for batches in ("paired", "balanced", "shuffled"):
        data = _data(birds, tiny_backbone, place, batches=batches, held_out=0.3)
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
                seen.append(batch["row"])  # noqa: B023

        _fit(_module(tiny_backbone), data, tmp_path, callbacks=[Watch()])
        held = data.held_out()
        assert held.sum() > 0.2 * len(held)
        assert not held[torch.cat(seen)].any()


def test_selection_before_the_average_and_without_images_is_told(
    birds, tiny_backbone, place, tmp_path
) -> None:
    callbacks = [HeldOutSelection(), ExponentialMovingAverage()]
    with pytest.raises(InvDiffError, match="must come after"):
        _fit(
            _module(tiny_backbone),
            _data(birds, tiny_backbone, place),
            tmp_path,
            callbacks=callbacks,
        )
    data = _data(birds, tiny_backbone, place, held_out=0.0)
    _fit(_module(tiny_backbone), data, tmp_path, callbacks=[HeldOutSelection(output=str(tmp_path))])
    assert "no images are held out" in read_json(tmp_path / "heldout.json")["reason"]
    assert any(value.any() for value in _weights(tmp_path).values())


def test_dropped_conditioning_trains_under_the_empty_prompt(
    birds, tiny_backbone, place, tmp_path
) -> None:
    losses: dict[str, torch.Tensor] = {}
    for dropout in (0.0, 1.0):
        module = _module(tiny_backbone, conditioning_dropout=dropout)
        data = _data(birds, tiny_backbone, place)
        _fit(module, data, tmp_path, max_steps=1)
        batch = data.training_latents(torch.arange(4))
        batch["draw"] = torch.zeros(4, dtype=torch.int64)
        batch["draw_count"] = 1
        with torch.no_grad():
            losses[str(dropout)] = module._losses(batch)
            rows = module.conditions.rows()["prompt_embeds"]
            module.conditions = Conditions({"prompt_embeds": rows[-1:].expand_as(rows)})
            losses[f"empty {dropout}"] = module._losses(batch)
    assert torch.equal(losses["1.0"], losses["empty 1.0"])
    assert not torch.equal(losses["0.0"], losses["empty 0.0"])


def test_unknown_weightings_are_refused(tiny_backbone, tmp_path) -> None:
    with pytest.raises(InvDiffError, match="loss_weighting=snr"):
        _module(tiny_backbone, loss_weighting="snr")
