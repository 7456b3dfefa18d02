"""A second device made of the CPU's memory: an operation that mixes the two fails, as on a machine with a GPU.

    with Elsewhere(model) as there:  # the model is on it
        model.device                 # "cpu:1"
        there.holds(tensor)

A tensor is on it if it was made there (device="cpu:1"), moved there, or computed from one there. Indices may come from the
CPU, values without dimensions too. Tensors inside an autograd function are not followed.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cpu:1")
MOVES = ("to", "copy_", "cpu")


class Elsewhere(TorchFunctionMode):
    """See above. Of a module, parameters and buffers are there from the start."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __enter__(self):
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.elsewhere = True
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            vars(tensor).pop("elsewhere", None)

    @staticmethod
    def holds(tensor):
        """Is it on this device?"""
        return getattr(tensor, "elsewhere", False)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(map(self.holds, given))
        if name == "__get__" and args and isinstance(args[0], torch.Tensor):
            if function.__self__ is torch.Tensor.device:
                return DEVICE if there else function(*args)
            return self.mark(function(*args), there)

        # where the result is
        index = name in ("__getitem__", "__setitem__") and self.holds(args[0])
        if there and not index and name not in MOVES:
            strays = [tuple(x.shape) for x in given if x.dim() and not self.holds(x)]
            assert not strays, f"{name} of tensors on two devices; on the CPU are {strays}"
        devices = [kwargs.get("device")] + [x for x in args if name == "to" and is_device(x)]
        for device in filter(None, devices):
            there = torch.device(device) == DEVICE
        there = there and name != "cpu"

        result = function(*args, **kwargs)
        if name in MOVES and any(result is x for x in given) and there != self.holds(result):
            result = result.clone()
        return self.mark(result, there)

    def mark(self, result, there):
        """Note of each tensor of a result where it is."""

        def note(x):
            if isinstance(x, torch.Tensor) and self.holds(x) != there:
                x.elsewhere = there
            return x

        return tree_map(note, result)


def is_device(value):
    """Is it what `to` takes for a device?"""
    return isinstance(value, (str, torch.device))
