"""The ops of the model, one public function each. `select` chooses the kernel backend: Triton or the plain reference.

The environment variable ACCELERON_REFERENCE_OPS names ops, separated by commas, that use the reference even where
Triton is selected: ACCELERON_REFERENCE_OPS=rope,moe. An op that contains one of them uses it too. `select` reads it.
"""

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
    import os
    from contextlib import contextmanager
    from functools import wraps
    from importlib import import_module
    from inspect import signature

    import torch
    import torch.nn.functional as F

    from . import reference
    from .autograd import autocast_dtype, no_autocast
    from .contract import MoEOutput, Plan, Routing
    from .reference import expert_mlp_token

    try:
        from triton.tools.ragged_tma import load_ragged  # noqa: F401 - older ones lack it
    except ImportError as error:
        _missing = f"Triton 3.6 or later can't be imported ({error}); `pip install triton` on Linux"
    else:
        _missing = None
        from . import configs, launch, routing

    ROUTING_OPS = reference.ROUTING_OPS if _missing else reference.ROUTING_OPS | routing.ROUTING_OPS
    # Ops that run the kernels of others themselves.
    _CONTAINS = {
        "moe": {"dispatch_plan", "expert_mlp", "grouped_gemm", "route_top2", "router_logits", "swiglu"},
        "split_rope": {"rope"},
    }
    _triton = {}
    _choice, _reference_ops = "auto", ()
    # Interpreted kernels are for CPU tensors, and none has run on an AMD GPU yet: both take --kernels triton.
    _auto_on_gpu = not (_missing or launch.INTERPRETED or torch.version.hip)

    def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether Triton is selected for such tensors; "auto" selects it on a GPU, except in float64."""
        if _choice == "auto":
            return _auto_on_gpu and device.type == "cuda" and dtype != torch.float64
        return _choice == "triton"

    def _op(name: str, module: str):
        """The op of this name: from this module if Triton is selected for its first tensor, else the reference's."""
        plain = getattr(reference, name)
        # The import binds the module's name in this package; the function of that name then replaces it.
        fused = _triton[name] = plain if _missing else getattr(import_module(f".{module}", __name__), name)

        parameters = signature(plain)
        first = next(iter(parameters.parameters))

        @wraps(plain)
        def op(*args, **kwargs):
            x = args[0] if args else kwargs[first]
            if dtype := autocast_dtype(x.device):
                arguments = parameters.bind(*args, **kwargs).arguments
                with no_autocast(x.device):
                    return _autocast(op, name, dtype, arguments)
            use_triton = uses_triton(x.device, x.dtype) and name not in _reference_ops
            return (fused if use_triton else plain)(*args, **kwargs)

        return op

    # Under torch.autocast these arguments are cast to its dtype, as those of F.linear are. The router computes in fp32,
    # the other ops in the dtype of their arguments, and nothing within an op is cast.
    _AUTOCAST = {
        "expert_mlp": ("x_TD",),
        "grouped_gemm": ("x_ND", "w_EFD"),
        "linear_cross_entropy": ("x_TD",),
        "moe": ("residual_TD",),  # and x, but for the router
    }

    def _autocast(op, name: str, dtype: torch.dtype, arguments: dict):
        """The op under autocast of this dtype; float64 stays."""
        if name == "moe" and arguments["x_TD"].dtype not in (dtype, torch.float64):
            return _moe_in(dtype, **arguments)
        for argument in _AUTOCAST.get(name, ()):
            x = arguments.get(argument)
            if x is not None and x.dtype != torch.float64:
                arguments[argument] = x.to(dtype)
        return op(**arguments)

    def _moe_in(
        dtype,
        x_TD,
        router_ED,
        w13_E2FD,
        w2_EDF,
        shared_w13_2WD,
        shared_w2_DW,
        residual_TD=None,
        force_load_balance=False,
    ) -> MoEOutput:
        """`moe` whose GEMMs are in this dtype, but whose router reads x as it is."""
        routing = route_top2(router_logits(x_TD, router_ED), force_load_balance)
        x_TD, shared_w13, shared_w2 = x_TD.to(dtype), shared_w13_2WD.to(dtype), shared_w2_DW.to(dtype)
        plan = dispatch_plan(routing.experts_TK, router_ED.shape[0])
        y_TD = expert_mlp(x_TD, routing.weights_TK, plan, w13_E2FD, w2_EDF)
        y_TD = y_TD + F.linear(swiglu(F.linear(x_TD, shared_w13)), shared_w2)
        y_TD = y_TD if residual_TD is None else y_TD + residual_TD.to(dtype)
        return MoEOutput(y_TD, routing.z_loss, routing.balance_loss, routing.counts_E)

    dispatch_plan = _op("dispatch_plan", "routing")
    expert_mlp = _op("expert_mlp", "expert_mlp")
    grouped_gemm = _op("grouped_gemm", "grouped_gemm")
    linear_cross_entropy = _op("linear_cross_entropy", "cross_entropy")
    moe = _op("moe", "moe")
    rms_norm = _op("rms_norm", "rms_norm")
    rope = _op("rope", "rope")
    route_top2 = _op("route_top2", "routing")
    router_logits = _op("router_logits", "router")
    split_rope = _op("split_rope", "rope")
    swiglu = _op("swiglu", "swiglu")
    OPS = tuple(_triton)

    def select(choice: str, device: torch.device) -> str:
        """Choose the kernel backend of this process; returns a line for the log with the reason.

        choice: "auto" is Triton for tensors on an NVIDIA GPU that it supports, and the reference for others (the
        default of a process that never calls this); "triton" is Triton for all; "reference" always works. `device` is
        where the tensors will be. Raises ValueError for "triton" where it can't run, with what is missing, for any
        other choice, and for an unknown op in ACCELERON_REFERENCE_OPS.
        """
        global _choice, _reference_ops
        if choice not in ("auto", "triton", "reference"):
            raise ValueError(f"--kernels {choice}: expected auto, triton or reference")
        reason = _missing or launch.unavailable(device)
        if choice == "triton" and reason:
            raise ValueError(f"--kernels triton: {reason}; or use --kernels auto or reference")
        if choice == "auto" and not reason:
            if device.type != "cuda":
                reason = "the interpreter is for --kernels triton alone"
            elif torch.version.hip:
                reason = "AMD GPUs: pass --kernels triton, which has not run on one yet"
        reference_ops = _read_reference_ops()
        if not _missing:
            configs.without_tma(), configs.table()  # raise ValueError for bad environment variables, before any launch
        _choice, _reference_ops = "reference" if choice == "auto" and reason else choice, reference_ops
        if choice == "reference":
            return "reference (asked for)"
        if choice == "auto" and reason:
            return f"reference ({reason})"
        line = f"Triton {launch.triton.__version__}" + (", interpreted" if device.type == "cpu" else "")
        if without := os.environ.get("ACCELERON_NO_TMA"):
            line += f", without TMA for {without}"
        return line + (f", but the reference for {', '.join(reference_ops)}" if reference_ops else "")

    def _read_reference_ops() -> tuple[str, ...]:
        """The ops that ACCELERON_REFERENCE_OPS names, and those that contain them."""
        listed = os.environ.get("ACCELERON_REFERENCE_OPS", "")
        names = [name.strip() for name in listed.split(",") if name.strip()]
        if not set(names) <= set(OPS):
            raise ValueError(f"ACCELERON_REFERENCE_OPS={listed}: expected names among {', '.join(OPS)}")
        return tuple(op for op in OPS if op in names or _CONTAINS.get(op, set()) & set(names))

    @contextmanager
    def selected(choice: str, device: torch.device):
        """Context with another choice of the kernel backend; raises what `select` raises."""
        global _choice, _reference_ops
        before = _choice, _reference_ops
        select(choice, device)
        try:
            yield
        finally:
            _choice, _reference_ops = before


__all__ = [
    "OPS",
    "ROUTING_OPS",
    "MoEOutput",
    "Plan",
    "Routing",
    "autocast_dtype",
    "dispatch_plan",
    "expert_mlp",
    "expert_mlp_token",
    "grouped_gemm",
    "linear_cross_entropy",
    "moe",
    "no_autocast",
    "rms_norm",
    "rope",
    "route_top2",
    "router_logits",
    "select",
    "selected",
    "split_rope",
    "swiglu",
    "uses_triton",
]
