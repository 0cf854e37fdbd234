"""The rows of the evidence: a name, a folder, and the command that fills it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)
# Seeds on which no rule of the inference was chosen, and those of the folders of photographs.
FRESH_SEEDS, PHOTOGRAPH_SEEDS = (61, 62, 63), (50, 51)
# The shipped backbones are trained on the first ratio of each data set; for the other ratios they
# are fine-tuned first.
RATIOS = {
    "waterbirds": {"": None},
    "celeba": {"1:4:4:1": None, "1:2:2:1": "1:2:2:1"},
    "fairface": {"3:2:1:1": None, "8:4:1:1": "8:4:1:1:1:1:4:8"},
}
FINE_TUNING = ("--scale.backbone_steps=800", "--scale.backbone_learning_rate=3e-4")
TRANSFORMER = (
    *("--scale.autoencoder_steps=1200", "--scale.backbone_batch=32"),
    *("--scale.backbone_steps=4500",),
)
# Script of each kind of photographs, and the flags that name folders of unpacked packages.
PICTURES = {
    "birds": ("build_waterbirds.py", {"--birds": "tuxpaint-stamps-default", "--scenes": ""}),
    "things": ("build_things.py", {"--folders": ""}),
    "digits": ("build_digits.py", {"--folders": ""}),
}
# Strengths of the balanced split of each data set, of which halves are drawn.
BALANCED = ("0.5", "1:1:1:1")


@dataclass(frozen=True)
class Row:
    """A row of the evidence.

    Attributes:
        name: name of the row and of its folder.
        kind: ``train``, ``backbone``, ``peers``, ``ablation`` or ``discovery``, which have figures,
            or ``packages`` or ``pictures``, which others read.
        command: words after the interpreter; the command goes on where it was stopped.
    """

    name: str
    kind: str
    command: tuple[str, ...]


def rows(output: Path) -> dict[str, Row]:
    """Return all rows by name; what a row reads of another comes before it."""
    parts = (_with_data(output), _transformer(output), _prompts(output), _inference(output))
    return {row.name: row for part in parts for row in part}


def _with_data(output: Path) -> Iterator[Row]:
    """Yield the runs with a data set, and what each part of the method is worth."""
    for data, ratios in RATIOS.items():
        for name, ratio in ratios.items():
            start, flags = _start(data, name), list[str]()
            if ratio is not None:
                flags = [f"--data.ratio={ratio}"]
                given = ("--backbone", f"asset:{data}", *flags, *FINE_TUNING)
                yield _run(output, f"{start}-backbone", data, 0, *given, command="backbone")
                flags += ["--backbone", str(_backbone(output, start))]
            for seed in SEEDS:
                yield _run(output, f"{start}-{seed}", data, seed, *flags)
    run = str(output / "waterbirds-0")
    command = ("benchmarks/ablation.py", run, "--output", str(output / "ablation"))
    yield Row("ablation", "ablation", command)


def _transformer(output: Path) -> Iterator[Row]:
    """Yield a small flow-matching transformer, trained from nothing and then debiased."""
    compiled = "--scale.compile_denoiser=true"
    for seed in SEEDS:
        name = f"transformer-{seed}"
        given = ("--family", "sana", *TRANSFORMER, compiled)
        yield _run(output, f"{name}-backbone", "waterbirds", seed, *given, command="backbone")
        trained = ("--backbone", str(_backbone(output, name)), compiled)
        yield _run(output, name, "waterbirds", seed, *trained)


def _prompts(output: Path) -> Iterator[Row]:
    """Yield runs without a data set, scored from the noises of those with one, beside peers."""
    for data, ratios in RATIOS.items():
        for seed in SEEDS:
            name = f"prompts-{data}-{seed}"
            given = ("--prompts", data, "--backbone", f"asset:{data}")
            yield _run(output, name, "prompts", seed, *given)
            labelled = output / f"{_start(data, next(iter(ratios)))}-{seed}"
            words = ["benchmarks/peers.py", str(labelled), "--prompts-run", str(output / name)]
            words += ["--output", str(output / f"{name}-peers")]
            if (data, seed) != ("waterbirds", 0):  # there all methods are compared
                words += ["--rows", "nothing", "ours_prompts"]
            yield Row(f"{name}-peers", "peers", tuple(words))


def _inference(output: Path) -> Iterator[Row]:
    """Yield what the inference finds in rendered pictures and in photographs."""
    grid = ("benchmarks/discovery.py", "--cache", str(output / "pools"))
    for name, seeds in (("discovery", SEEDS), ("discovery-fresh", FRESH_SEEDS)):
        yield Row(name, "discovery", (*grid, "--seeds", *map(str, seeds)))
    last = ("--seeds", str(FRESH_SEEDS[-1]))
    yield Row("halves", "discovery", (*grid, *last, "--strengths", *BALANCED, "--halves", "100"))
    two = ("--two-biases", "0.95:0.8", "0.8:0.95", "--seeds", *map(str, FRESH_SEEDS))
    yield Row("two-biases", "discovery", (*grid, *two))

    packages = output / "packages"
    fetched = ("docs/real_photos/fetch_packages.py", "--output", str(packages))
    yield Row("packages", "packages", fetched)
    built = []
    for kind, (script, flags) in PICTURES.items():
        for seed in PHOTOGRAPH_SEEDS:
            for strength in ("0.95", "0.5"):
                built.append(f"{kind}-{strength}-{seed}")
                words = [f"docs/real_photos/{script}", "--output", str(output / built[-1])]
                for flag, part in flags.items():
                    words += [flag, str(packages / part)]
                words += ["--seed", str(seed), "--correlation", strength]
                yield Row(built[-1], "pictures", tuple(words))
    folders = [str(output / name) for name in built]
    words = [*grid, "--backbone", "waterbirds", "--photographs", *folders]
    yield Row("photographs", "discovery", tuple(words))


def _run(
    output: Path, name: str, experiment: str, seed: int, *flags: str, command: str = "train"
) -> Row:
    words = ["-m", "invdiff_pl", command, "--experiment", experiment]
    words += ["--run-dir", str(output / name), f"--seed_everything={seed}", *flags]
    return Row(name, command, tuple(words))


def _start(data: str, ratio: str) -> str:
    return f"{data}-{ratio.replace(':', '_')}" if ratio else data


def _backbone(output: Path, start: str) -> Path:
    return output / f"{start}-backbone" / "backbone" / "pipeline"


def chosen(known: dict[str, Row], words: Sequence[str]) -> list[Row]:
    """Return the rows whose names begin with one of the words.

    Raises:
        ValueError: if no row begins with a word.
    """
    for word in words:
        if not any(name.startswith(word) for name in known):
            raise ValueError(f"no row begins with {word!r}: there are {', '.join(known)}.")
    return [row for row in known.values() if row.name.startswith(tuple(words))]
