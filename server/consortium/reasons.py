"""Why a site may be revoked."""

from __future__ import annotations

from typing import Literal

Reason = Literal["left", "key-compromise", "expelled"]
