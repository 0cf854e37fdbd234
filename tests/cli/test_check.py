"""Looking over a data set: counts by hand, what is to be mended, and the exit status."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from invdiff_pl.cli.check import aligned
from invdiff_pl.cli.main import main

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def _check(root: Path, capsys, *flags: str, experiment: str = "custom") -> tuple[int, str]:
    words = ["check", "--experiment", experiment, "--experiments", str(EXPERIMENTS)]
    few = ["--data.min_images_per_prompt=2"] if experiment == "custom" else []
    status = main([*words, "--data", str(root), *few, *flags])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sound images of two prompts: 2 of each (prompt, weather) in train, 1 in val and test."""
    root = tmp_path / "pictures"
    root.mkdir()
    rows = []
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for prompt in ("a mallard", "a raven"):
            for weather in ("cloudy", "sunny"):
                for number in range(count):
                    name = f"{split}-{prompt[2:]}-{weather}-{number}.png"
                    Image.new("RGB", (40, 40)).save(root / name)
                    rows.append((name, prompt, split, weather))
    table = pd.DataFrame(rows, columns=["file_name", "text", "split", "weather"])
    table.to_csv(root / "metadata.csv", index=False)
    return root


WEATHER = "--data.attribute_column=weather"


def _numbers(text: str, start: str) -> list[int]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [int(cell) for cell in line.removeprefix(start).split()]


def test_a_sound_data_set_has_nothing_to_mend(pictures, capsys) -> None:
    status, text = _check(pictures, capsys, WEATHER)
    assert status == 0
    assert "16 images of 2 prompts" in text
    assert _numbers(text, "readable  ") == [16]
    assert _numbers(text, "a mallard") == [2, 2, 1, 1, 1, 1]
    assert _numbers(text, "all") == [4, 4, 2, 2, 2, 2]
    assert "nothing to fix" in text


def test_every_fault_is_counted_and_named(pictures, tmp_path, capsys) -> None:
    (pictures / "train-mallard-cloudy-0.png").unlink()
    (pictures / "train-mallard-sunny-0.png").write_bytes(b"")
    whole = (pictures / "train-raven-cloudy-0.png").read_bytes()
    (pictures / "train-raven-cloudy-0.png").write_bytes(whole[:60])
    shutil.move(pictures / "train-raven-sunny-0.png", tmp_path / "away.png")
    (pictures / "train-raven-sunny-0.png").symlink_to(tmp_path / "away.png")
    Image.new("L", (40, 31)).save(pictures / "val-mallard-cloudy-0.png")
    image = Image.new("CMYK", (40, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(pictures / "val-raven-cloudy-0.png", format="JPEG", exif=exif)
    Image.new("RGBA", (40, 40)).save(pictures / "test-raven-cloudy-0.png")
    status, text = _check(pictures, capsys, WEATHER)
    assert status == 1
    assert _numbers(text, "readable  ") == [12]
    for kind in ("missing", "empty (zero bytes)", "unreadable or truncated"):
        assert _numbers(text, kind) == [1]
    assert _numbers(text, "links that leave the folder") == [1]
    assert _numbers(text, "mode CMYK (CMYK, converted)") == [1]
    assert _numbers(text, "mode L (grey)") == [1]
    assert _numbers(text, "mode RGBA (with transparency, laid over white)") == [1]
    assert _numbers(text, "a mallard") == [1, 1, 1, 1, 1, 1]
    assert "1 images have a side shorter than 32 pixels and are enlarged: val-mallard" in text
    assert "1 images are turned upright" in text
    assert "- 1 missing: train-mallard-cloudy-0.png" in text
    assert "- 1 unreadable or truncated: train-raven-cloudy-0.png (" in text
    assert "--data.broken=skip" in text


def test_broken_images_that_are_left_out_need_no_mending(pictures, capsys) -> None:
    (pictures / "train-mallard-cloudy-0.png").unlink()
    status, text = _check(pictures, capsys, WEATHER, "--data.broken=skip")
    assert status == 0
    assert "1 images are left out" in text
    assert _numbers(text, "a mallard") == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (",val,", ",train,", "the val split, which trains the classifier that scores, has no"),
        (",test,", ",val,", "no prompt has test images of every attribute class"),
        (",train,", ",test,", "no image in its train split"),
        (",train,sunny", ",train,foggy-dark", "line 4: weather is 'foggy-dark', expected"),
        ("train-mallard-cloudy-0", "../secret", "line 2: file_name is '../secret.png'"),
        ("train-mallard-cloudy-0", "train-mallard-cloudy-1", "line 2 and line 3 both name"),
    ],
)
def test_a_table_that_cannot_be_used_is_to_be_mended(pictures, capsys, old, new, told) -> None:
    table = pictures / "metadata.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    status, text = _check(pictures, capsys, WEATHER, "--data.attribute_names=[cloudy, sunny]")
    assert status == 1
    assert "to fix:" in text
    assert told in text


def test_without_an_attribute_images_are_counted_by_prompt(pictures, capsys) -> None:
    status, text = _check(pictures, capsys)
    assert status == 0
    assert _numbers(text, "a raven") == [4, 2, 2]
    assert "nothing will be scored" in text


def test_every_data_module_can_be_checked(birds, capsys) -> None:
    status, text = _check(birds, capsys, experiment="waterbirds")
    assert status == 0
    assert "train land" in text


def test_wrong_flags_and_folders_are_told_in_one_line(pictures, capsys) -> None:
    for flags, told in (
        (["--data.broken=perhaps"], "broken"),
        (["--data.weather=1"], "weather"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--scale", "huge"], "huge.yaml"),
    ):
        status, text = _check(pictures, capsys, *flags)
        assert status == 2
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert told in text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["a", "12"], ["long", "3"]]) == "a     12\nlong   3"
