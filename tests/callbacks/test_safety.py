"""Faults put into training: it stops, says where, and keeps what was good."""

import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from trainers import quiet_trainer

from invdiff_pl.callbacks import StopOnDivergence, StopOnSigterm
from invdiff_pl.modules.common import check_finite
from invdiff_pl.utils import processes
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO

FAULT = 5


class _Model(pl.LightningModule):
    """Three weights; at one step its loss or a gradient is not finite."""

    stage = "adapter"

    def __init__(self, fault: str = "none", at: int = FAULT) -> None:
        super().__init__()
        self.fault = fault
        self.at = at
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.weights.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        spoilt = self.fault == "gradient" and self.global_step == self.at
        return gradient.masked_fill(torch.tensor([False, True, False]), torch.inf if spoilt else 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        losses = self.weights * batch.mean()
        if self.fault == "loss" and self.global_step == self.at:
            losses = losses * torch.tensor([1.0, torch.nan, 1.0])
        if self.fault == "signal" and self.global_step == self.at:
            signal.raise_signal(signal.SIGTERM)
        loss = losses.square().sum()
        check_finite(loss, self, {str(n): value.detach() for n, value in enumerate(losses)})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _train(folder: Path, model: _Model, resume: Path | None = None) -> pl.Trainer:
    checkpoints = ModelCheckpoint(
        folder / "adapter" / "checkpoints", "step", every_n_train_steps=2, save_last=True
    )
    callbacks = [StopOnDivergence(), StopOnSigterm(), checkpoints]
    trainer = quiet_trainer(folder, max_steps=10, callbacks=callbacks, enable_checkpointing=True)
    trainer.strategy.checkpoint_io = SafeCheckpointIO()
    batches = torch.ones(20, 1)
    trainer.fit(model, batches, ckpt_path=resume, weights_only=True)
    return trainer


def _weights(checkpoint: Path) -> torch.Tensor:
    return SafeCheckpointIO().load_checkpoint(checkpoint)["state_dict"]["weights"]


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("loss", "the loss is nan (environment 1)"),
        ("gradient", "the gradients' norm is inf (of weights)"),
    ],
)
def test_divergence_is_told_with_stage_step_and_last_good_checkpoint(
    fault: str, named: str, tmp_path: Path
) -> None:
    model = _Model(fault)
    with pytest.raises(InvDiffError) as stopped:
        _train(tmp_path, model)
    checkpoint = tmp_path / "adapter" / "checkpoints" / "last.ckpt"
    message = str(stopped.value)
    assert message.startswith(f"stage adapter, step {FAULT}: {named}")
    assert f"last good checkpoint is {checkpoint}" in message
    assert "lower `learning_rate`, or use trainer.precision=32-true" in message
    assert torch.isfinite(model.weights).all()
    assert torch.isfinite(_weights(checkpoint)).all()


class _Fused(_Model):
    """With the optimizer of the modules, which can be told on the device to skip steps."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


def test_a_look_that_comes_later_still_finds_the_weights_of_before_the_fault(tmp_path) -> None:
    weights = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *unused) -> None:
            weights[trainer.global_step] = pl_module.weights.detach().clone()

    model = _Fused("gradient")
    callbacks = [StopOnDivergence(deferred=True), Keep()]
    # Step 5 is spoilt, the host looks at step 8.
    trainer = quiet_trainer(tmp_path, max_steps=10, log_every_n_steps=4, callbacks=callbacks)
    with pytest.raises(InvDiffError, match=f"stage adapter, step {FAULT}: the gradients' norm"):
        trainer.fit(model, torch.ones(20, 1))
    assert sorted(weights) == list(range(1, 9))
    assert not torch.equal(weights[FAULT], weights[FAULT - 1])
    assert torch.equal(weights[8], weights[FAULT])
    assert torch.equal(model.weights, weights[FAULT])


def test_no_checkpoint_is_written_after_a_fault_that_nobody_has_looked_at(tmp_path) -> None:
    model = _Fused("gradient")
    checkpoints = ModelCheckpoint(tmp_path, "step", every_n_train_steps=7, save_last=True)
    callbacks = [StopOnDivergence(deferred=True), checkpoints]
    settings = {"log_every_n_steps": 100, "enable_checkpointing": True}
    trainer = quiet_trainer(tmp_path, max_steps=10, callbacks=callbacks, **settings)
    with pytest.raises(InvDiffError, match=f"step {FAULT}"):
        trainer.fit(model, torch.ones(20, 1))
    assert trainer.global_step == 7
    assert not list(tmp_path.glob("*.ckpt"))


def test_the_checkpoint_from_before_the_fault_goes_on_to_the_healthy_result(tmp_path) -> None:
    healthy = _Model()
    _train(tmp_path / "healthy", healthy)
    with pytest.raises(InvDiffError):
        _train(tmp_path, _Model("gradient"))
    mended = _Model()
    _train(tmp_path, mended, tmp_path / "adapter" / "checkpoints" / "last.ckpt")
    assert torch.equal(mended.weights, healthy.weights)


def test_a_fault_before_the_first_checkpoint_says_that_there_is_none(tmp_path) -> None:
    with pytest.raises(InvDiffError, match="there is no checkpoint yet"):
        _train(tmp_path, _Model("loss", at=0))


def test_sigterm_saves_the_step_it_arrived_in_and_a_resumed_run_writes_to_the_same_file(
    tmp_path,
) -> None:
    with processes.raising_on_sigterm(), pytest.raises(SIGTERMException):
        _train(tmp_path, _Model("signal", at=0))
    checkpoint = tmp_path / "adapter" / "checkpoints" / "last.ckpt"
    assert SafeCheckpointIO().load_checkpoint(checkpoint)["global_step"] == 1
    _train(tmp_path, _Model(), checkpoint)
    assert SafeCheckpointIO().load_checkpoint(checkpoint)["global_step"] == 10
    assert not list(checkpoint.parent.glob("last-*"))


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with processes.raising_on_sigterm():
        processes.defer_sigterm(True)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(processes.Terminated) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is previous
