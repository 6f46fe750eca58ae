"""A simulated accelerator: what a GPU refuses and waits for, found on a machine without one.

A tensor "on the device" is a wrapper that says it lies on the device "meta" and holds a CPU tensor.
Every operation is computed on the CPU, but as CUDA would do it, operands on two devices and CPU
generators for the device's own random numbers are refused. An operation for whose result CUDA makes
the host wait is written down, with the line of ours that asked for it.

Not simulated: kernels, memory, autocast and torch.compile, which are left out.
"""
import contextlib
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parent.parent
# Their result, or the size of their result, has to be known to the host.
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_dim", "equal",
           "unique_consecutive", "masked_select", "repeat_interleave", "_linalg_check_errors",
           "_linalg_eigh", "_linalg_svd"}
INDEXING = {"index", "index_put_", "index_put"}                    # takes indices on the CPU, too


class Far(torch.Tensor):
    """A tensor on the simulated device."""
    is_meta, is_pinned = False, lambda self: False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=DEVICE)

    def __init__(self, near):
        self.near = near

    def __repr__(self, **_):
        return f"on the device: {self.near}"

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.cpu(), spec)

    def numpy(self):
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    def __reduce_ex__(self, protocol):                             # in a file it is like any other
        return self.near.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, *_):
        raise RuntimeError(f"{func} of a tensor on the device, outside of the simulation")


class Accelerator(TorchDispatchMode):
    """The context in which the device exists. recent: [(operation, file:line)] that waited."""

    def __init__(self):
        super().__init__()
        self.recent, self.stack = [], contextlib.ExitStack()

    def wait(self, what):
        frame = sys._getframe(1)
        while frame and not (Path(frame.f_code.co_filename).parent == ROOT):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "a test"
        self.recent.append((what, where))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        near = [x for x in tensors if not isinstance(x, Far)]
        here = bool(far)                                           # is the result on the device?
        if kwargs.get("device") is not None:
            here = kwargs["device"].type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if any(x.device.type == DEVICE.type for x in near):
            raise RuntimeError(f"{name}: a tensor of the real device {DEVICE}: the simulation "
                               f"lacks the function that made it")
        if name == "_to_copy" and here != bool(far) or name == "copy_" and far and near:
            to_far = here if name == "_to_copy" else isinstance(args[0], Far)
            if not (to_far and (kwargs.get("non_blocking") or True in args[2:])):
                self.wait("copy to the device" if to_far else "copy to the host")
        elif far:
            strange = [x for x in near if x.dim() and not (name in INDEXING and x is not args[0]
                                                           and isinstance(args[0], Far))]
            if strange:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, but "
                                   f"found one of shape {tuple(strange[0].shape)} on the CPU")
            indices = tree_leaves(args[1]) if name in INDEXING else []
            indices = [x for x in indices if isinstance(x, torch.Tensor)]
            # A mask: CUDA counts it, but fills where the value is a single number.
            counted = any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not (
                name == "index_put_" and args[2].numel() == 1)
            if name in WAITING or counted:
                self.wait(name)
            elif any(not isinstance(x, Far) for x in indices):
                self.wait("copy of an index to the device")
        if here and any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError(f"{name}: expected a generator of the device, but found a CPU one")
        known = {id(x.near): x for x in far}
        args, kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))

        def wrapped(x):
            if not isinstance(x, torch.Tensor) or not (here or id(x) in known):
                return x
            return known[id(x)] if id(x) in known else Far(x)      # itself, when changed in place
        return tree_map(wrapped, func(*args, **kwargs))

    def __enter__(self):
        """Functions that never reach the dispatcher, or that ask for the names of devices."""
        def on_device(make):
            def made(data, *args, device=None, **more):
                near = make(data, *args, **more)
                return near if device is None else near.to(device)
            return made
        autocast = torch.autocast
        for place, name, value in (
                (torch, "tensor", on_device(torch.tensor)),
                (torch, "as_tensor", on_device(torch.as_tensor)),
                (torch.Tensor, "pin_memory", torch.Tensor.clone),
                (torch, "autocast", lambda kind, *more, **options: contextlib.nullcontext()
                    if kind == DEVICE.type else autocast(kind, *more, **options)),
                (torch, "compile", lambda net, **_: net),
                (torch.nn.Module, "compile", lambda _, **__: None),
                (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                    lambda: [DEVICE.type, "cpu"])):
            self.stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        self.stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()
