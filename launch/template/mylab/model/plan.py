"""How the model may be cut: its modules are Llama's, and so is the plan. A module more takes a line more."""

from regrow.models.llama3.plan import LLAMA3_PLAN
from regrow.models.plan import ShardingPlan

__all__ = ["GEGLU_PLAN"]

GEGLU_PLAN: ShardingPlan = {**LLAMA3_PLAN}
