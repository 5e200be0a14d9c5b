"""Training by many processes, on `torch.distributed`: the same program on parts of each batch.

    torch.distributed.init_process_group("gloo")  # or "cpu:gloo,cuda:nccl"; started by torchrun
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    grads_of = fn.distributed.value_and_grad(net, loss)
    value, grads = grads_of(params, x.tensor_split(size)[rank], target.tensor_split(size)[rank])
    params, state = optimizer.step_(params, grads, state)

The law: k ranks on parts of a batch, some of them perhaps empty, compute what one process computes
on the whole, up to rounding; and every rank gets the same bits. All ranks of a group call the same
functions in the same order. `group` is a process group of `torch.distributed`; None is the default
group.

A rank that raises in one of these functions, or that is lost, ends the others. They raise a
RuntimeError that names it, at once where the connection breaks, and within the group's timeout
otherwise. After that the group cannot be used. On NCCL alone, without a backend for the CPU,
torch's own watchdog ends the processes, and does not name the rank.
"""

from funcnet.distributed.gradients import value_and_grad
from funcnet.distributed.mean import mean
from funcnet.distributed.moments import merge_moments
from funcnet.distributed.sharded import Sharded

__all__ = ["Sharded", "mean", "merge_moments", "value_and_grad"]
