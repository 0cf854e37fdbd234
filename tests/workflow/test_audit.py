"""What an audit counts, keeps, tells and refuses, on a pipeline with random weights."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_families import made
from torch import Tensor

import invdiff_pl as inv
from invdiff_pl.adapters import build_adapter
from invdiff_pl.adapters.stack import carrying
from invdiff_pl.backbones.architecture import TINY
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import new_pipeline
from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings
from invdiff_pl.metrics.audit_counts import Cell
from invdiff_pl.metrics.readers import CheckedReader, FunctionReader
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

PROMPTS = ("a photo of a mallard", "a photo of a <b>raven</b>")
QUICK: dict[str, Any] = {"per_prompt": 6, "steps": 1, "progress": False}


@pytest.fixture
def pipe(tiny_backbone: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)


def lora(pipe: StableDiffusionPipeline, folder: Path, seed: int = 0, size: float = 0.3) -> Path:
    """A LoRA file that changes what is drawn."""
    adapter = build_adapter("lora", pipe.unet)
    torch.manual_seed(seed)
    for value in adapter.parameters().values():
        value.data = torch.randn_like(value) * size
    adapter.save(folder)
    adapter.detach()
    return folder / "pytorch_lora_weights.safetensors"


def brightness(images: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3))


class Recorder:
    """Reads which pictures are brighter than the median of the first batch, and counts calls."""

    def __init__(self, name: str = "light") -> None:
        self.name, self.classes = name, ("dark", "bright")
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return (brightness(images) > brightness(self.images[0]).median()).long()


def test_an_audit_reads_the_pipelines_own_samples_before_and_after(pipe, tmp_path) -> None:
    file = lora(pipe, tmp_path / "lora")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    reader = Recorder()
    found = inv.audit(pipe, PROMPTS, readers=[reader], lora=file, batch_size=12, **QUICK)
    assert pipe.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    conditions = Conditions(frozen_denoiser(pipe).condition([*PROMPTS, ""]))
    settings: dict[str, Any] = {"seed": 0, "steps": 1, "guidance_scale": 7.5}
    rows = torch.arange(12)
    pipe.set_progress_bar_config(disable=True)
    plain = sample_images(pipe, conditions[rows // 6], conditions.null, rows.tolist(), **settings)
    assert torch.equal(reader.images[0], plain)
    pipe.load_lora_weights(str(file))
    adapted = sample_images(pipe, conditions[rows // 6], conditions.null, rows.tolist(), **settings)
    assert torch.equal(reader.images[1], adapted)
    assert not torch.equal(plain, adapted)
    bright = brightness(plain) > brightness(plain).median()
    expected = bright.view(2, 6).sum(1)
    assert found.counts("light").tolist() == torch.stack([6 - expected, expected], 1).tolist()
    shares = expected / 6
    assert found.measures("light")["bias"]["value"].tolist() == pytest.approx(
        (2 * shares - 1).abs().tolist()
    )
    with pytest.raises(InvDiffError, match="expected one of 'light', before, after"):
        found.counts("colour")


def test_several_loras_are_active_together(pipe, tmp_path) -> None:
    files = [lora(pipe, tmp_path / str(seed), seed) for seed in (0, 1)]
    drawn = []
    for stack in ([files[0]], [files[1]], files):
        reader = Recorder()
        inv.audit(pipe, PROMPTS, readers=[reader], lora=stack, batch_size=12, **QUICK)
        drawn.append(reader.images[1])
    assert not torch.equal(drawn[0], drawn[1])
    for number, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=str(number))
    pipe.set_adapters(["0", "1"])
    conditions = Conditions(frozen_denoiser(pipe).condition([*PROMPTS, ""]))
    rows = torch.arange(12)
    pipe.set_progress_bar_config(disable=True)
    both = sample_images(
        pipe, conditions[rows // 6], conditions.null, rows.tolist(), seed=0, steps=1,
        guidance_scale=7.5,
    )  # fmt: skip
    assert torch.equal(drawn[2], both)


def test_a_lora_of_ones_own_stays_active_and_an_audited_one_can_be_left_out(pipe, tmp_path) -> None:
    own, other = (lora(pipe, tmp_path / str(seed), seed) for seed in (0, 1))
    pipe.load_lora_weights(str(own), adapter_name="own")
    latents, text = (
        torch.randn(1, 4, 16, 16),
        frozen_denoiser(pipe).condition([""])["prompt_embeds"],
    )

    def output() -> Tensor:
        with torch.no_grad():
            return pipe.unet(latents, 10, text).sample

    before = output()
    with carrying(pipe, [other]) as without:
        changed = output()
        with without():
            assert torch.equal(output(), before)
        assert torch.equal(output(), changed)
    assert not torch.equal(changed, before)
    assert torch.equal(output(), before)
    assert pipe.get_list_adapters() == {"unet": ["own"]}


def test_seeds_are_counted_together_and_scales_apart(pipe) -> None:
    reader = Recorder()
    found = inv.audit(
        pipe, PROMPTS, readers=[reader], guidance_scale=[1.0, 7.5], seed=[0, 3], **QUICK
    )
    assert found.cells == tuple(Cell(g, s, "before") for g in (1.0, 7.5) for s in (0, 3))
    parts = [found.counts("light", guidance_scale=7.5, seed=seed) for seed in (0, 3)]
    assert torch.equal(found.counts("light", guidance_scale=7.5), parts[0] + parts[1])
    assert found.counts("light").sum(1).tolist() == [12, 12]
    table = found.to_pandas()
    assert len(table) == 2 * 2 * 2
    assert (table["low"] <= table["share"]).all()
    assert (table["share"] <= table["high"]).all()


def test_two_attributes_are_counted_together(pipe) -> None:
    half = FunctionReader(lambda images: torch.arange(len(images)) % 2, ["a", "b"], "half")
    third = FunctionReader(lambda images: torch.arange(len(images)) % 3, ["x", "y", "z"], "third")
    found = inv.audit(
        pipe, PROMPTS, readers=[half, third], batch_size=6, target={"half": [0.5, 0.5]}, **QUICK
    )
    assert found.classes["half × third"] == ("a × x", "a × y", "a × z", "b × x", "b × y", "b × z")
    assert found.counts("half × third").tolist() == [[1] * 6, [1] * 6]
    with pytest.raises(InvDiffError, match="there is no attribute 'age'"):
        inv.audit(pipe, PROMPTS, readers=[half], target={"age": [0.5, 0.5]}, **QUICK)


def test_errors_of_a_reader_are_taken_out_beside_the_plain_figures(pipe) -> None:
    pictures = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    labels = torch.tensor([0, 1]).repeat_interleave(20)
    told = torch.tensor([0] * 20 + [0] * 5 + [1] * 15)
    reader = CheckedReader(
        FunctionReader(lambda images: told if len(images) == 40 else 1 - torch.arange(6) % 2, "ab"),
        [pictures],
        labels,
    )
    found = inv.audit(pipe, PROMPTS, readers=[reader], batch_size=6, **QUICK)
    assert found.counts("attribute").tolist() == [[3, 3], [3, 3]]
    rates = found.corrected("attribute")
    assert rates is not None
    assert rates.shares[:, 1].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert found.to_pandas()["corrected_share"][1] == pytest.approx(2 / 3)


def test_finished_cells_are_not_drawn_again(pipe, tmp_path) -> None:
    settings = {**QUICK, "guidance_scale": [1.0, 2.0], "folder": tmp_path / "audit"}

    class Interrupted(Recorder):
        def __call__(self, images: Tensor) -> Tensor:
            if len(self.images) == 1:
                raise KeyboardInterrupt
            return super().__call__(images)

    broken = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        inv.audit(pipe, PROMPTS, readers=[broken], batch_size=12, **settings)
    reader = Recorder()
    reader.images = broken.images[:1]
    first = inv.audit(pipe, PROMPTS, readers=[reader], batch_size=12, **settings)
    assert len(reader.images) == 2
    again = Recorder()
    second = inv.audit(pipe, PROMPTS, readers=[again], batch_size=4, **settings)
    assert not again.images
    assert torch.equal(first.counts("light"), second.counts("light"))
    other = inv.audit(pipe, PROMPTS[:1], readers=[again], batch_size=12, **settings)
    assert len(again.images) == 2
    assert other.counts("light").shape == (1, 2)
    cell = next((tmp_path / "audit" / "cells").iterdir())
    content = cell.read_bytes()
    cell.unlink()  # tensors may still be mapped from it
    cell.write_bytes(content[:100])
    assert torch.equal(
        inv.audit(pipe, PROMPTS, readers=[reader], batch_size=12, **settings).counts("light"),
        first.counts("light"),
    )


class Page(HTMLParser):
    """What a page loads, runs and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data) -> None:
        self.text += data


def test_files_tell_the_same_figures_and_the_page_loads_nothing(pipe, tmp_path) -> None:
    file = lora(pipe, tmp_path / "lora")
    reader = Recorder("light & shade")
    found = inv.audit(
        pipe, PROMPTS, readers=[reader, Recorder("b")], lora=file, guidance_scale=[1, 3], **QUICK
    )
    folder = found.save(tmp_path / "audit")
    assert {path.name for path in folder.iterdir()} == {"audit.csv", "audit.json", "audit.html"}
    told = read_json(folder / "audit.json")
    assert len(told["figures"]) == 3 * 2 * 2
    first = told["figures"][0]
    expected = found.measures("light & shade", "before", 1.0)["parity_gap"]
    assert first["measures"]["parity_gap"]["mean"] == pytest.approx(float(expected["mean"]))
    table = pd.read_csv(folder / "audit.csv")
    assert table["count"].sum() == 3 * 2 * 2 * 12
    text = (folder / "audit.html").read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "a photo of a <b>raven</b>" in page.text
    assert not re.search(r"url\(|@import", text)
    bias = first["measures"]["bias"]
    assert f"{bias['mean']:.3f} [{bias['interval'][0]:.3f}" in page.text


def test_without_a_reader_environments_are_inferred_and_counted(pipe, monkeypatch) -> None:
    # Features that tell a hidden attribute: rare in the first prompt, usual in the second.
    counts = {0: 0}

    def features(images: Tensor) -> Tensor:
        start = counts[0]
        counts[0] += len(images)
        rows = torch.arange(start, start + len(images)) % 240
        hidden = torch.where(rows < 120, rows % 10 == 0, rows % 10 > 0).float()
        noise = torch.randn(len(images), 6, generator=torch.Generator().manual_seed(start))
        return noise + 8 * hidden[:, None] * torch.eye(6)[0] + (rows >= 120)[:, None]

    monkeypatch.setattr("invdiff_pl.workflow.audit_drawing.BlockFeatures", lambda *given: features)
    few = HiddenAttributeSettings(starts=10, resamples=19, values=(), candidates=1)
    found = inv.audit(
        pipe, PROMPTS, discovery=few, per_prompt=120, steps=1, progress=False, batch_size=60
    )
    (attribute,) = found.classes
    shares = found.counts(attribute).double() / 120
    assert shares.sort(1).values.tolist() == [pytest.approx([0.1, 0.9])] * 2
    assert shares[0].argmax() != shares[1].argmax()
    assert "best candidate: bias" in found.notes[0]
    assert found.corrected(attribute) is not None


def test_prompts_readers_and_numbers_that_cannot_be_used_are_refused(pipe) -> None:
    reader = Recorder()
    for prompts in ([], [" "], ["a", "a"]):
        with pytest.raises(InvDiffError, match="prompts: expected at least one, none empty"):
            inv.audit(pipe, prompts, readers=[reader], **QUICK)
    with pytest.raises(InvDiffError, match="different names, found light, light"):
        inv.audit(pipe, PROMPTS, readers=[reader, reader], **QUICK)
    wrong = FunctionReader(lambda images: torch.full((len(images),), 5), ["a", "b"])
    with pytest.raises(InvDiffError, match="numbers from 5 to 5"):
        inv.audit(pipe, PROMPTS, readers=[wrong], **QUICK)


def test_pickles_and_loras_of_another_architecture_are_refused_in_a_line(pipe, tmp_path) -> None:
    pickled = tmp_path / "style.pt"
    torch.save({"a": torch.zeros(1)}, pickled)
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_lora_weights.bin").write_bytes(b"")
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(pickled.read_bytes())
    wide = new_pipeline(replace(TINY, unet_channels=(32, 32)), PROMPTS, 0)
    deep = lora(wide, tmp_path / "wide")
    strange = tmp_path / "strange.safetensors"
    from safetensors.torch import save_file

    save_file({"other.lora_A.weight": torch.zeros(2, 3)}, strange)
    before = pipe.unet.state_dict().keys()
    for source, told in (
        (pickled, "others are pickles"),
        (folder, "expected one .safetensors file in it"),
        (renamed, "does not fit the pipeline"),
        (deep, "does not fit the pipeline"),
        (strange, "does not fit the pipeline"),
        (tmp_path / "nothing.safetensors", "there is no such file"),
    ):
        with pytest.raises(InvDiffError, match=told) as caught:
            inv.audit(pipe, PROMPTS, readers=[Recorder()], lora=source, **QUICK)
        assert "\n" not in str(caught.value)
        assert pipe.unet.state_dict().keys() == before


def test_a_pipeline_that_loads_no_loras_is_told_by_name(tmp_path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    told = pytest.raises(InvDiffError, match="a PixArtSigmaPipeline loads no LoRAs")
    with told, carrying(made("pixart"), [file]):
        pass
