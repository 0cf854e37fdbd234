"""The verdict on a candidate, from the tests of shares and of alignment."""

from typing import Literal

from invdiff_pl.environments.judging import Judged
from invdiff_pl.environments.settings import HiddenAttributeSettings

Verdict = Literal["bias", "no bias", "unaligned", "untestable"]


def verdict_on(
    each: Judged,
    p_shares: float | None,
    p_alignment: float,
    settings: HiddenAttributeSettings,
) -> tuple[Verdict, str]:
    """Return the verdict on a candidate whose prompts can be compared, and the reason."""
    told = f"alignment {each.alignment:.2f}, p = {p_alignment:.2g}"
    if each.gain <= 0:
        reason = "images fall into groups in only a few prompts."
    elif not each.shared:
        reason = "most prompts do not show all of its groups."
    elif each.difference < settings.least_difference:
        reason = f"shares differ between prompts by only {each.difference:.2f}."
    elif p_shares is None:
        return "unaligned", f"what differs between groups is not the same in all prompts ({told})."
    elif p_shares > settings.alpha:
        reason = f"shares differ between prompts by no more than chance (p = {p_shares:.2g})."
    else:
        return "bias", (
            f"groups that look the same in all prompts differ in their shares by "
            f"{each.difference:.2f} (p = {p_shares:.2g}; {told})."
        )
    return "no bias", reason
