import pickle

import pytest
import torch
from scipy.stats import binomtest

from invdiff_pl.metrics import PromptAccuracy
from invdiff_pl.utils.errors import InvDiffError


def test_accuracy_counts_right_and_wrong_by_prompt() -> None:
    metric = PromptAccuracy(3)
    metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]))
    metric.update(torch.tensor([2, 2]), torch.tensor([2, 1]))
    for copy in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
        found = copy.compute()
        assert found["counts"].tolist() == [[1, 1], [0, 0], [1, 2]]
        assert found["mean"].item() == pytest.approx(3 / 5)
        expected = binomtest(3, 5).proportion_ci(method="wilson")
        assert found["interval"].tolist() == pytest.approx(tuple(expected))


def test_no_image_is_refused() -> None:
    metric = PromptAccuracy(3)
    metric.update(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InvDiffError, match="at least one image"):
        metric.compute()
