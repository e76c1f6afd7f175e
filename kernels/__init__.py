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
    from .reference import (
        ROUTING_OPS,
        Plan,
        Routing,
        dispatch_plan,
        expert_mlp,
        expert_mlp_token,
        grouped_gemm,
        linear_cross_entropy,
        rms_norm,
        rope,
        route_top2,
        swiglu,
    )

__all__ = [
    "ROUTING_OPS",
    "Plan",
    "Routing",
    "dispatch_plan",
    "expert_mlp",
    "expert_mlp_token",
    "grouped_gemm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "route_top2",
    "select",
    "swiglu",
]


def select(choice: str) -> str:
    """Resolve `--kernels {auto,triton,reference}` to a line for the log that names the provider and the reason.

    Raises ValueError for "triton", which this version has no kernels for yet, and for any other name.
    """
    if choice == "triton":
        raise ValueError("--kernels triton: this version has no Triton kernels yet; use auto or reference")
    if choice not in ("auto", "reference"):
        raise ValueError(f"--kernels {choice}: expected auto, triton or reference")
    return "reference (asked for)" if choice == "reference" else "reference (this version has no Triton kernels yet)"
