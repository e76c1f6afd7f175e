"""All ops on Triton kernels, with the same names as in torch_ops. Importing this requires Triton 3.6 or later."""

import torch

from .cross_entropy import linear_cross_entropy as linear_cross_entropy
from .dispatch import dispatch_plan as dispatch_plan
from .expert_mlp import expert_mlp as expert_mlp
from .grouped_gemm import grouped_gemm as grouped_gemm
from .moe import moe as moe
from .rms_norm import rms_norm as rms_norm
from .rope import rope as rope
from .rope import split_rope as split_rope
from .router import router_logits as router_logits
from .routing import route_topk as route_topk
from .swiglu import swiglu as swiglu

ROUTING_OPS = frozenset(
    {torch.ops.acceleron_triton.route_topk.default, torch.ops.acceleron_triton.dispatch_plan.default}
)
