"""What training reads of the environment stage, and what it leaves for held-out risks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from invdiff_pl.data.environments import held_out, read_environments, usual_first
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
    assert found.candidates == ()


def test_what_the_inference_tells_is_kept(tmp_path) -> None:
    facts = {"bias_found": False, "reason": "shares differ by 0.01 only.", "candidate": 0}
    found = read_environments(_write(tmp_path, {**facts, "groups": 3}), 4)
    assert found.groups == 3  # one of them is empty
    assert found.bias_found is False
    assert found.withheld == "the inference found no bias (shares differ by 0.01 only)"
    assert found.candidates == (0,)


def _candidates(folder: Path) -> Path:
    """Two candidates, of two and of three groups, neither of them called a bias."""
    facts = {"bias_found": False, "candidates": [{"groups": 2}, {"groups": 3}]}
    for number, assignments in enumerate([[0, 0, 1, 1], [0, 2, 0, 1]]):
        inside = folder / f"candidate-{number}"
        inside.mkdir()
        save_file({"assignments": torch.tensor(assignments)}, inside / "environments.safetensors")
    return _write(folder, facts)


def test_a_candidate_that_a_person_chose_is_trained_on_whatever_the_verdict(tmp_path) -> None:
    found = read_environments(_candidates(tmp_path), 4, candidate=1)
    assert found.assignments.tolist() == [0, 2, 0, 1]
    assert (found.groups, found.withheld, found.candidates) == (3, None, (1,))


def test_two_candidates_are_crossed(tmp_path) -> None:
    found = read_environments(_candidates(tmp_path), 4, candidate="0,1")
    # The pair of groups (g, h) is environment g + 2 h.
    assert found.assignments.tolist() == [0, 4, 1, 3]
    assert found.groups == 6
    assert torch.equal(found.memberships.sum(1), torch.ones(4))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (2, "candidate=2: .* holds candidates 0 to 1"),
        ("0,0", "candidate=0,0: expected a number"),
        ("first", "candidate=first: expected a number"),
        (-1, "candidate=-1: expected a number"),
    ],
)
def test_a_candidate_that_is_not_there_is_told(tmp_path, candidate, message) -> None:
    with pytest.raises(InvDiffError, match=message):
        read_environments(_candidates(tmp_path), 4, candidate=candidate)


def test_environments_are_numbered_by_how_usual_they_are_in_each_prompt() -> None:
    values = torch.eye(2)[torch.tensor([0, 0, 1, 1, 1, 0])]
    ordered = usual_first(values, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert ordered.argmax(1).tolist() == [0, 0, 1, 0, 0, 1]


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
