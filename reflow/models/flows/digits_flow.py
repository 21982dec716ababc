"""The digits flow model as a base: Stable Diffusion 3 without T5, of which one zero stands for all 256 that its pipeline appends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflow.models.digits_flow import BUILTIN, MISSING_TOKENS, OneForMany
from reflow.models.family import Family
from reflow.models.flows.sd3 import CLIPS, SD3Base


class DigitsFlowBase(SD3Base):
    """Same numbers as the stock pipeline's to rounding, at an eighth of its tokens."""

    def encode(self, prompts: Sequence[str], null: bool, device: torch.device) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.text_pipeline().encode_prompt(
            prompt=list(prompts), prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def example_rows(self) -> dict[str, tuple[int, ...]]:
        rows = super().example_rows()
        tokens, width = rows["encoder_hidden_states"]
        return rows | {"encoder_hidden_states": (tokens - MISSING_TOKENS + 1, width)}

    def fitted(self, network: Any) -> Any:
        network.set_attn_processor(OneForMany(MISSING_TOKENS))
        return network


DIGITS_FLOW = Family(
    "digits-flow",
    ("StableDiffusion3Pipeline",),
    pooled=False,
    builtin=BUILTIN,
    base=DigitsFlowBase,
    network=("transformer", "SD3Transformer2DModel"),
    texts=CLIPS,
)
