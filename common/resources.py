"""How fast, not what: settings that change neither the mechanism nor what is released.

They are a type of their own, so that no privacy decision can come to depend on them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from privet.common.study.study import Section


class Resources(Section):
    """The machine a site trains on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first CUDA device where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the base; auto takes bf16 where the hardware computes in it. Adapters stay in fp32."""
    physical_batch: Annotated[int, Field(ge=1)] = 32
    """Records per forward pass; a larger logical batch is accumulated."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of PyTorch; None leaves its default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
