"""Write docs/study-reference.md: every table and field of a study file, from the models that validate it.

`python tools/study_reference.py` writes the page; a test compares it with the models.
"""

from __future__ import annotations

from pathlib import Path

from privet.simulations.drafts.reference import study_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study-reference.md"

if __name__ == "__main__":
    PAGE.write_text(study_page(), encoding="utf-8")
    print(f"written  {PAGE}")
