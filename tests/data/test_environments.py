"""What training reads of the environment stage, and what it leaves for held-out risks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from invdiff_pl.data.environments import held_out, read_environments
from invdiff_pl.utils.errors import InvDiffError

ASSIGNMENTS = torch.tensor([0, 0, 1, 0])


def _write(folder: Path, facts: dict | None = None, **tensors: torch.Tensor) -> Path:
    save_file({"assignments": ASSIGNMENTS, **tensors}, folder / "environments.safetensors")
    if facts is not None:
        (folder / "environments.json").write_text(json.dumps(facts))
    return folder


def test_hard_assignments_become_rows_of_one_1(tmp_path) -> None:
    found = read_environments(_write(tmp_path), 4)
    assert found.memberships.tolist() == [[1, 0], [1, 0], [0, 1], [1, 0]]
    assert found.bias_found is None
    assert found.withheld is None  # environments of one's own, of which nothing is told
    assert found.timesteps == found.timestep_weights == ()


def test_what_the_inference_tells_is_kept(tmp_path) -> None:
    facts = {"timesteps": [499, 999], "timestep_weights": [0.2, 0.8], "bias_found": False}
    found = read_environments(_write(tmp_path, {**facts, "groups": 3}), 4)
    assert found.groups == 3  # one of them is empty
    assert found.bias_found is False
    assert found.withheld == "the inference found no bias"
    assert found.timesteps == (499, 999)
    assert found.timestep_weights == (0.2, 0.8)


def test_soft_memberships_are_read_where_they_are_asked_for(tmp_path) -> None:
    soft = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [1.0, 0.0]])
    folder = _write(tmp_path, memberships=soft)
    torch.testing.assert_close(read_environments(folder, 4, soft=True).memberships, soft)
    assert read_environments(folder, 4).memberships.unique().tolist() == [0, 1]
    assert read_environments(folder, 4, soft=True).assignments.tolist() == ASSIGNMENTS.tolist()


def test_missing_files_memberships_and_other_data_are_told(tmp_path) -> None:
    with pytest.raises(InvDiffError, match="run the environments stage first"):
        read_environments(tmp_path, 4)
    _write(tmp_path)
    with pytest.raises(InvDiffError, match="soft_environments"):
        read_environments(tmp_path, 4, soft=True)
    with pytest.raises(InvDiffError, match="4 images but the train split has 5"):
        read_environments(tmp_path, 5)


def test_prompts_of_few_images_give_their_share_together() -> None:
    # Two hundred prompts of twenty images, one of which is in the second environment.
    prompts = torch.arange(200).repeat_interleave(20)
    assignments = (torch.arange(4000) % 20 == 0).long()
    held = held_out(prompts, assignments, 0.1, seed=0)
    assert assignments[held].bincount().tolist() == [380, 20]
    of_first = prompts[held & (assignments == 0)].bincount(minlength=200)
    assert set(of_first.tolist()) == {1, 2}
    assert torch.equal(held, held_out(prompts, assignments, 0.1, seed=0))


def test_the_same_share_of_every_prompt_and_environment_is_held_out() -> None:
    prompts = torch.tensor([0] * 100 + [1] * 50)
    assignments = torch.tensor([0] * 90 + [1] * 10 + [0] * 47 + [1] * 3)
    held = held_out(prompts, assignments, 0.1, seed=0)
    cells = (prompts * 2 + assignments)[held].bincount(minlength=4)
    assert cells.tolist() == [9, 1, 5, 0]
    assert torch.equal(held, held_out(prompts, assignments, 0.1, seed=0))
    assert not torch.equal(held, held_out(prompts, assignments, 0.1, seed=1))
    assert not held_out(prompts, assignments, 0.0, seed=0).any()
    with pytest.raises(InvDiffError, match=r"held_out=1\.0"):
        held_out(prompts, assignments, 1.0, seed=0)
