"""Which heads of hybrid attention are dense: fixed, or chosen from the prompt while it is read."""

from hooked_mllm.attention.routing.budget import Budget as Budget
from hooked_mllm.attention.routing.budget import PerLayer as PerLayer
from hooked_mllm.attention.routing.budget import Total as Total
from hooked_mllm.attention.routing.lost_attention import lost_attention as lost_attention
from hooked_mllm.attention.routing.query_aware import LayerChoice as LayerChoice
from hooked_mllm.attention.routing.query_aware import QueryAwareHeads as QueryAwareHeads
from hooked_mllm.attention.routing.static import StaticHeads as StaticHeads
