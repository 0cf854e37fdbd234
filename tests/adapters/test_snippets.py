"""The Python of README, docs and exported model cards, run word for word."""

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import KINDS, run_folder
from PIL import Image
from tiny_families import sdxl

import invdiff_pl as inv
from invdiff_pl.cli.export import export
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings

REPOSITORY = Path(__file__).parents[2]


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _run_blocks(text: str) -> list[Any]:
    """Run every Python block, each by itself; returns the values of their last lines."""
    values = []
    for block in _blocks(text):
        *lines, last = ast.parse(block).body
        assert isinstance(last, ast.Expr)
        names: dict[str, Any] = {}
        exec(compile(ast.Module(lines, []), "block", "exec"), names)
        values.append(eval(compile(ast.Expression(last.value), "block", "eval"), names))
    return values


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Path:
    """An empty folder to run blocks in: word for word, but with fewer drawings, a short search, two
    steps of training and no calibration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inv.generate, "__defaults__", (16,))
    few = HiddenAttributeSettings(starts=4, values=(), alpha=0.2, resamples=4)
    for function, changed in (
        (inv.discover, {"settings": few}),
        (inv.debias, {"steps": 2, "calibration_samples": 0, "batch_size": 8}),
        (inv.audit, {"per_prompt": 2, "steps": 1}),
    ):
        defaults = {**(function.__kwdefaults__ or {}), **changed}
        monkeypatch.setattr(function, "__kwdefaults__", defaults)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_every_python_block_of_a_page_draws_a_picture(page, quick) -> None:
    run_folder(quick / "runs" / "waterbirds" / "mini", "asset:waterbirds", "lora")
    (quick / "invdiff_pl").mkdir()
    (quick / "invdiff_pl" / "assets").symlink_to(REPOSITORY / "invdiff_pl" / "assets")
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    pictures = _run_blocks(text)
    assert len(pictures) == text.count("```python") >= 1
    for picture in pictures:
        assert isinstance(picture, Image.Image)
        assert picture.size == (32, 32)


# What stands in for models, pictures and devices that are not at hand, and for sizes.
STAND_INS = {
    "/models/": "models/",
    "/data/": "data/",
    'to("cuda")': 'to("cpu")',
    "steps=2000": "steps=2",
    "per_prompt=256": "per_prompt=8",
    '"num_images_per_prompt": 64': '"num_images_per_prompt": 2, "num_inference_steps": 2',
    "invariant_scale=0.8": "invariant_scale=0.8, num_inference_steps=2",
}
COOKBOOK = (REPOSITORY / "docs" / "cookbook.md").read_text(encoding="utf-8")
RECIPES = {part.splitlines()[0]: _blocks(part) for part in COOKBOOK.split("\n## ")[1:]}


@pytest.mark.parametrize("recipe", [title for title, blocks in RECIPES.items() if blocks])
def test_every_python_block_of_the_cookbook_runs(recipe, quick, tiny_backbone, weights) -> None:
    (quick / "models").mkdir()
    (quick / "models" / "my-pipeline").symlink_to(tiny_backbone)
    (quick / "models" / "clip").symlink_to(weights / "clip")
    sdxl().save_pretrained(quick / "models" / "sdxl")
    adapter = run_folder(quick / "runs" / "prompts" / "sd14", tiny_backbone, "lora")
    lora = adapter / "adapter" / "adapter" / "pytorch_lora_weights.safetensors"
    shutil.copy(lora, quick / "models" / "style.safetensors")
    for number, colour in enumerate(["red", "blue", "green", "grey"] * 6):
        file = quick / "data" / "mine" / ("nurse", "pilot")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(file)
    told = re.compile("|".join(map(re.escape, STAND_INS)))
    for block in RECIPES[recipe]:
        text = told.sub(lambda match: STAND_INS[match[0]], block)
        exec(compile(text, recipe, "exec"), {})


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_python_block_of_an_exported_card_draws_a_picture(
    kind, tiny_backbone, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path / "run", tiny_backbone, kind)
    environments = run / "environments" / "environments.json"
    prompt = r"a \"photo\" of a “mallard”, 50 %"
    environments.write_text(environments.read_text().replace("a photo of a mallard", prompt))
    export(run, Path("even") / "even birds")
    monkeypatch.chdir("even")
    pictures = _run_blocks(Path("even birds/README.md").read_text(encoding="utf-8"))
    assert len(pictures) == 2
    assert all(isinstance(picture, Image.Image) for picture in pictures)
