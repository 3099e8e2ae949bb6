"""The orders that the columns of lora_B have on fused experts, by the words of Unsloth's configs.

What they mean: `molehill.engine.formats.readers.expert_layout`. Command lines know them without
torch.
"""

from typing import Literal, get_args

Layout = Literal["rank_major", "grouped_by_expert"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
