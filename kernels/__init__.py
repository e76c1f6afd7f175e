"""The ops of the model, one public function each. `select` says who serves them: Triton or the plain reference."""

if __name__ == "kernels":
    # Somebody else's `import kernels` (transformers' of PyPI's package of that name) found this folder, as a checkout's
    # root is on sys.path. It gets the other package, or an empty one: a second copy of ours would register the custom
    # ops again and disable those in use.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _spec:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
else:
    from functools import wraps
    from inspect import signature

    import torch

    from . import reference
    from .reference import MoEOutput, Plan, Routing, expert_mlp_token

    try:
        from triton.tools.ragged_tma import load_ragged  # noqa: F401 - older ones lack it
    except ImportError as error:
        _missing = f"Triton 3.6 or later can't be imported ({error}); `pip install triton` on Linux"
    else:
        _missing = None
        # The modules first: a function below that has a module's name must be the one that remains.
        from . import cross_entropy, expert_mlp, grouped_gemm, launch, moe, rms_norm, rope, router, routing, swiglu

    ROUTING_OPS = reference.ROUTING_OPS if _missing else reference.ROUTING_OPS | routing.ROUTING_OPS
    _triton = (
        {}
        if _missing
        else {
            "dispatch_plan": routing.dispatch_plan,
            "expert_mlp": expert_mlp.expert_mlp,
            "grouped_gemm": grouped_gemm.grouped_gemm,
            "linear_cross_entropy": cross_entropy.linear_cross_entropy,
            "moe": moe.moe,
            "rms_norm": rms_norm.rms_norm,
            "rope": rope.rope,
            "route_top2": routing.route_top2,
            "router_logits": router.router_logits,
            "split_rope": rope.split_rope,
            "swiglu": swiglu.swiglu,
        }
    )
    _choice = "auto"
    # Under the interpreter kernels are for the CPU, and for who asks.
    _auto_on_gpu = not (_missing or launch.INTERPRETED)

    def _op(name: str):
        """The op of this name: Triton's on a GPU, except in float64; the reference's elsewhere; or as selected."""
        plain = getattr(reference, name)
        fused = plain if _missing else _triton[name]

        first = next(iter(signature(plain).parameters))

        @wraps(plain)
        def op(*args, **kwargs):
            x = args[0] if args else kwargs[first]
            auto = _auto_on_gpu and x.is_cuda and x.dtype != torch.float64
            use_triton = auto if _choice == "auto" else _choice == "triton"
            return (fused if use_triton else plain)(*args, **kwargs)

        return op

    dispatch_plan = _op("dispatch_plan")
    expert_mlp = _op("expert_mlp")
    grouped_gemm = _op("grouped_gemm")
    linear_cross_entropy = _op("linear_cross_entropy")
    moe = _op("moe")
    rms_norm = _op("rms_norm")
    rope = _op("rope")
    route_top2 = _op("route_top2")
    router_logits = _op("router_logits")
    split_rope = _op("split_rope")
    swiglu = _op("swiglu")

__all__ = [
    "ROUTING_OPS",
    "MoEOutput",
    "Plan",
    "Routing",
    "dispatch_plan",
    "expert_mlp",
    "expert_mlp_token",
    "grouped_gemm",
    "linear_cross_entropy",
    "moe",
    "rms_norm",
    "rope",
    "route_top2",
    "router_logits",
    "select",
    "split_rope",
    "swiglu",
]


def select(choice: str, device: "torch.device") -> str:
    """Let Triton or the reference serve the ops of this process; returns a line for the log with the reason.

    choice: "auto" is Triton for tensors on a GPU that it supports, and the reference for others (what a process that
    never calls this has, too); "triton" is Triton for all; "reference" is always there. `device` is where the tensors
    will be. Raises ValueError for "triton" where it can't run, with what is missing, and for any other name.
    """
    global _choice
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"--kernels {choice}: expected auto, triton or reference")
    reason = _missing or launch.unavailable(device)
    if choice == "triton" and reason:
        raise ValueError(f"--kernels triton: {reason}; or use --kernels auto or reference")
    _choice = "reference" if choice == "auto" and reason else choice
    if choice == "reference":
        return "reference (asked for)"
    if choice == "auto" and (reason or device.type != "cuda"):
        return f"reference ({reason or 'the interpreter is for --kernels triton alone'})"
    return f"Triton {launch.triton.__version__}" + (", interpreted" if device.type == "cpu" else "")
