"""Train the float parameters of a quantized model with FSDP2 in two processes: python fsdp.py.

FSDP2 shards parameters. Codes are buffers, so every process holds all of them. Quantize before `fully_shard`: a sharded
model is refused.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fewbits

PROCESSES = 2


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64))


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Train the biases and the norm for one step; return the outputs afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    return model(x).detach()


def work(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=PROCESSES)
    model = fewbits.quantize(build(), "int8").model
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    print(f"rank {rank} holds the codes of every layer, and of the parameters {shards}", flush=True)
    x = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)
    whole = fewbits.quantize(build(), "int8").model
    torch.testing.assert_close(step(model, x), step(whole, x))

    # To save the model, gather its parameters in a model that is not sharded.
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    torch.testing.assert_close(whole(x), model(x))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (Path(folder, "meeting-point").as_uri(),), nprocs=PROCESSES)
