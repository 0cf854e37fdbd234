"""The result of an audit, and its files."""

from pathlib import Path

from invdiff_pl.metrics.audit_counts import AuditCounts
from invdiff_pl.utils.files import atomic_path, write_json, write_text

CSV, JSON, PAGE = "audit.csv", "audit.json", "audit.html"


class Audit(AuditCounts):
    """The result of an audit; see :class:`~invdiff_pl.metrics.audit_counts.AuditCounts`."""

    def save(self, folder: str | Path) -> Path:
        """Write ``audit.csv``, ``audit.json`` and ``audit.html`` into a folder, and return it.

        The page is a single file, which loads and runs nothing.
        """
        from invdiff_pl.report.audit_page import audit_page  # noqa: PLC0415 - plots take a second

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        figures = self.figures()
        with atomic_path(target / CSV) as partial:
            self.to_pandas().to_csv(partial, index=False)
        told = {"settings": self.settings, "prompts": list(self.prompts), "notes": self.notes}
        write_json(target / JSON, {**told, "figures": figures})
        write_text(target / PAGE, audit_page(self, figures))
        return target
