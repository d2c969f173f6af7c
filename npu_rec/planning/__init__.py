"""What a training needs and moves on a cluster, worked out on one machine."""

from npu_rec.planning.advice import make_plan
from npu_rec.planning.plan import Machines, Plan, as_document, machines_of, simulate_rank
from npu_rec.planning.size import facts_of

__all__ = ["Machines", "Plan", "as_document", "facts_of", "machines_of", "make_plan", "simulate_rank"]
