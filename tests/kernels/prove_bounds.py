"""Prove with triton-viz that kernels access only the memory of their arguments. Prints every access that may not.

triton-viz runs a kernel once, with a variable for each program id, loop index and `tl.arange`. An SMT solver searches
for values that give an address outside the arguments. No memory is read, so a large size takes milliseconds.

test_bounds.py runs this script in its own process, because triton-viz patches Triton. The lengths of a kernel's
`tl.arange` must differ: triton-viz has one variable for all ranges of the same length.
"""

import torch
import triton_viz
from triton_viz.clients import Sanitizer
from triton_viz.clients.sanitizer import sanitizer as viz

from acceleron.kernels import dispatch, launch, rms_norm, rope, router, routing, swiglu

# triton-viz 3.0 cannot evaluate the addresses of the other kernels:
#   _up_kernel, _hidden_grad_kernel, _rows_kernel: a loop ends at a tl.max ("to_py must be implemented by subclasses")
#   _weight_grad_kernel: the expert is a tl.sum ("Concretize for op sum is not implemented")
#   _add_shares_kernel: the same tl.sum, for which it silently takes one of the summands
#   _scatter_kernel, _combine_kernel, _token_grad_kernel: indices are loaded from an address that contains a division
#       ("Concretize for op idiv is not implemented")
#   _place_kernel: tl.sum loses its shape ("Value argument cannot be block type if pointer argument is not a block")
#   _logits_kernel, _router_grad_kernel: a transposed tile loses its shape ("len() of unsized object")
#   _cross_entropy_kernel: it runs only the first branch of an `if` on a loaded value; the other has a tl.fma, which
#       it does not support
PROVEN = {
    dispatch: ["_count_kernel"],
    rms_norm: ["_rms_norm_kernel", "_rms_norm_backward_kernel"],
    rope: ["_rope_kernel"],
    router: ["_input_grad_kernel"],
    routing: ["_route_kernel", "_route_sums_kernel", "_route_backward_kernel"],
    swiglu: ["_swiglu_kernel", "_swiglu_backward_kernel"],
}


def launch_kernels(T, D, E, K, C):
    """Launch the kernels of PROVEN on T tokens, D columns, E experts, K experts per token and heads of C channels."""
    x, logits, ids, scores = (
        torch.empty(T, D),
        torch.empty(T, E),
        torch.empty(T, K, dtype=torch.int32),
        torch.empty(T, K),
    )
    for residual in (None, x):
        rms_norm._rms_norm(x, torch.empty(D), 1e-6, residual)
        rms_norm._rms_norm_backward(x, residual, x, torch.empty(D), torch.empty(T))
    swiglu.swiglu_forward(torch.empty(T, 2 * D))
    swiglu.swiglu_backward(x, torch.empty(T, 2 * D))
    for normalize in (True, False):
        routing.route(logits, K, normalize, force_load_balance=normalize)
        routing.route_backward(logits, ids, scores, torch.empty(()), torch.empty(E), normalize)
    dispatch.build_plan(ids, E)
    router._input_grad(logits, x, torch.empty(E, D))
    angles = torch.empty(T, C)
    rope._rope(torch.empty(2, T, 3, C), torch.empty(2, T, 1, C), angles, angles, False)


def launch_rope_on_views(S, C):
    """Launch the rope kernel on the parts of one qkv tensor, of S positions and heads of C channels."""
    q, k, v = torch.empty(2, S, 5, C).split([3, 1, 1], dim=2)
    angles = torch.empty(S, C)
    rope._rope(q, k, angles, angles, False)
    rope._split_rope_backward(q, k, v, angles, angles)


def segments(x):
    """Return the first and last address of each row of a view. triton-viz adds the view's offset twice."""
    offset = x.storage_offset() * x.element_size()
    return [(first - offset, last - offset) for first, last in unpatched_segments(x)]


class Skipped:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


if __name__ == "__main__":
    unpatched_segments = viz.get_physical_addr_from_tensor_slice
    viz.get_physical_addr_from_tensor_slice = segments
    launch.cpu_device = launch.cpu_device._replace(processors=132)  # of an H100
    dispatch._place_kernel = Skipped()
    sanitizers = {}
    for module, names in PROVEN.items():
        for name in names:
            sanitizers[name] = Sanitizer(abort_on_error=False)
            setattr(module, name, triton_viz.trace(sanitizers[name])(getattr(module, name)))
    launch_rope_on_views(S=9, C=6)
    for E, K in ((3, 1), (5, 2), (11, 8)):
        launch_kernels(T=70, D=33, E=E, K=K, C=6)  # no size is a multiple of a block
    triton_viz.config.virtual_memory = True  # do not copy the arguments
    launch_kernels(T=262_144, D=1536, E=64, K=8, C=96)
    for name, sanitizer in sanitizers.items():
        for argument in sorted({record.tensor_name for record in sanitizer.records}):
            print(f"{name} accesses memory outside {argument}")
