"""Train the denoiser with several processes, each on a part of every batch (docs/distributed.md).

torchrun --nproc-per-node 2 examples/distributed.py    # with two
python examples/distributed.py                         # with one

However many processes there are, they see the same batches, and train to the same parameters up to
rounding. Rank 0 writes checkpoints to --out. A run goes on from the newest one that it finds there,
with any number of processes.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optree
import torch
import torch.distributed as dist
from denoise import UNET, varied
from denoising.data import Data, photograph_data, scaled
from denoising.evaluation import measure
from denoising.noise import Noise
from denoising.tiles import Denoiser

import funcnet as fn


def join_group() -> tuple[int, int]:
    """(this process's rank, the number of processes) in the group that torchrun has started."""
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def choose_device() -> torch.device:
    """The GPU of this process, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def newest(checkpoints: fn.Checkpoints, new: Any) -> tuple[int, Any]:
    """(steps done, the tree) of the newest checkpoint that rank 0 finds; (0, `new`) if it has none.

    The other ranks may be on machines that do not see its disk. The tensors have the memory formats
    of `new`, in which sums are rounded alike, and are on its devices.
    """
    found = [checkpoints.latest(like=new) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] is None:
        return 0, new
    step, tree = found[0]
    return step, optree.tree_map(lambda x, saved: saved.to(x.device), new, tree)


def train(data: Data, steps: int, batch_size: int, every: int, out: Path) -> Any:
    """Parameters after `steps` steps, on batches of which each rank takes a part."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device, key = choose_device(), fn.key(1)
    grads_of = fn.distributed.value_and_grad(UNET, fn.MSE())
    optimizer = fn.Adam(fn.schedules.one_cycle(4e-3, steps))
    params = UNET.init(fn.key(0), data.noisy.shape[1:], device=device)
    checkpoints = fn.Checkpoints(out / "checkpoints")
    done, (params, state) = newest(checkpoints, (params, optimizer.init(params)))
    per_epoch = -(-len(data.noisy) // batch_size)
    for step in range(done, steps):
        epoch, batch = divmod(step, per_epoch)
        epoch_key = fn.fold_in(key, epoch)
        order = fn.permutation(epoch_key, len(data.noisy))
        rows = order.split(batch_size)[batch].tensor_split(size)[rank]
        variant = fn.fold_in(epoch_key, batch)
        x, target = (varied(scaled(t[rows], device), variant) for t in (data.noisy, data.target))
        loss, grads = grads_of(params, x, target)
        grads, _ = fn.clip_by_global_norm(grads, max_norm=0.1)
        params, state = optimizer.step_(params, grads, state)
        if rank == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            checkpoints.save(step + 1, (params, state))
            print(f"step {step + 1}: loss {float(loss):.5f}", flush=True)
    return params


def main(arguments: Sequence[str] | None = None) -> None:
    """Train; rank 0 measures and writes the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps to train (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="over all ranks (%(default)s)")
    parser.add_argument(
        "--patches", type=int, default=10_000, help="patches to cut out (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=100, help="steps between checkpoints (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/distributed"), help="output folder (%(default)s)"
    )
    options = parser.parse_args(arguments)
    rank, _ = join_group()
    data = photograph_data(None, Noise("gaussian", 25.0), options.patches, fn.key(2))
    params = train(data, options.steps, options.batch_size, options.checkpoint_every, options.out)
    if rank == 0:
        print(f"held out: {measure(Denoiser.of(UNET, params), data)['psnr']:.2f} dB")
        fn.save_model(options.out / "denoiser.safetensors", UNET, params)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
