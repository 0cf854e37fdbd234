"""The time that a whole run takes in either recipe, added up from its stages."""

from statistics import median
from typing import Any

from bench_environments import IMAGES
from bench_measure import Comparison
from bench_stages import VISITS

# A mini run of Waterbirds, in the reference's recipe and in ours: images, 400 steps of 48, 256
# samples of each of 6 prompts at two scales. The reference makes its memberships from its scores.
SAMPLES = 2 * 256 * 6
UNITS = {
    "latent preparation": (0, VISITS * IMAGES),
    "scoring": (IMAGES, 0),
    "features": (0, IMAGES),
    "search": (IMAGES, IMAGES),
    "adapter (lora)": (400 * 48, 400 * 48),
    "sampling": (SAMPLES, SAMPLES),
    "evaluation": (SAMPLES, SAMPLES),
}


def whole_run(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Add up the seconds of a mini run of Waterbirds by round; ``None`` if a stage is missing.

    The classifier, looks during training and the report are left out on both sides; on ours, the
    calibration, too.
    """
    by_name = {result["stage"]: result for result in results}
    if not set(UNITS).issubset(by_name):
        return None
    seconds = {}
    for number, side in enumerate(("reference", "ours")):
        rounds = [
            [count[number] * each for each in by_name[name][f"{side}_seconds"]]
            for name, count in UNITS.items()
        ]
        seconds[side] = [sum(each) for each in zip(*rounds, strict=True)]
    low, ratio, high = Comparison(seconds["reference"], seconds["ours"]).ratios()
    return {
        "stage": "a whole run",
        "unit": "runs",
        "reference_per_s": 1 / median(seconds["reference"]),
        "ours_per_s": 1 / median(seconds["ours"]),
        "ratio": ratio,
        "ratio_range": [low, high],
        "reference_peak_mib": None,
        "ours_peak_mib": None,
        "parity": f"{median(seconds['reference']):.0f} s against {median(seconds['ours']):.0f}",
    }
