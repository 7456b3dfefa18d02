"""Full tuning by several processes: each keeps a part of the LLM's blocks, by FSDP2.

Weights of a block are gathered for its forward and its backward pass, gradients are added over the
processes and divided again. Embeddings, norm, head, projector and tower are whole everywhere.
Every pass is made by all processes together, so each must make as many (`finish_passes`). That
holds for dpo.py and sft.py. Methods that sample while they train, or keep a whole copy as pi_ref,
keep the LLM whole in every process. With one process nothing here does anything.
"""

import torch

import processes
from model import pack

divided = []  # the model whose blocks are divided, if there is one
passes = 0  # what this process has made since the last step
expected = 0  # what some process makes in this step: the most micro-batches


def shard(model):
    """Divide the blocks of an LLM that trains whole, if they need not be whole."""
    blocks = model.llm.base_model.layers
    trains = any(p.requires_grad for p in blocks.parameters()) and not model.lora_layers()
    if processes.total == 1 or not trains or model.initial_llm:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    base = model.llm.base_model
    elsewhere = set(base.parameters()) - set(blocks.parameters())
    settings = {
        "mesh": init_device_mesh(model.device.type, (processes.total,)),
        # the dtype in which the blocks compute is also that in which they travel
        "mp_policy": MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32),
    }
    for block in blocks:
        fully_shard(block, **settings)
        block.set_gradient_divide_factor(1.0)  # the sum: a loss is divided by all its examples
        block.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    fully_shard(base, ignored_params=elsewhere, **settings)
    base.register_forward_hook(count)
    divided.append(model)


def count(*_):
    """Note a pass that will have a backward pass."""
    global passes
    passes += torch.is_grad_enabled()


def finish_passes():
    """Make the passes that another process makes and this one did not, with a loss of 0.

    To be called before the processes meet in any other way.
    """
    global passes
    for model in divided:
        token = torch.zeros(1, dtype=torch.long)
        for _ in range(expected - passes):
            batch = pack([token], [[token]]).to(model.device)
            (model.log_probs(batch)[0].sum() * 0).backward()
    passes = 0


def gather(model):
    """After training: all weights in every process for good, so that each can sample alone."""
    if model not in divided:
        return
    base = model.llm.base_model
    for module in (base, *base.layers):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    divided.remove(model)


# ---- tensors of which a process holds a part


def is_part(tensor):
    """Is it divided among the processes?"""
    if not divided:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def apart(params):
    """Lists of the whole and of the divided ones, without empty lists: no kernel takes both."""
    lists = [[p for p in params if is_part(p) == part] for part in (False, True)]
    return [params for params in lists if params]


def whole(tensor):
    """The whole of a tensor; of a divided one on the CPU. All processes must call it."""
    return tensor.full_tensor().cpu() if is_part(tensor) else tensor


def part_like(p, tensor):
    """This process's part of a whole tensor, divided as p is; on p's device."""
    tensor = tensor.to(p.device)
    if not is_part(p) or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def clip(params, parts, max_norm):
    """`clip_grad_norm_` of whole parameters and divided ones together -> the norm before."""
    grads = [p.grad for p in params if p.grad is not None]
    pieces = [p.grad.to_local() for p in parts if p.grad is not None]
    norm = torch.nn.utils.get_total_norm
    squares = norm(grads) ** 2 + processes.all_reduced(norm(pieces) ** 2)
    total = squares.sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for g in (*grads, *pieces):
        g.mul_(scale)
    return float(total)
