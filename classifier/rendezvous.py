"""How processes that torchrun has restarted find each other in a store that outlives them."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PREFIX_KEY = "image_classification/part"  # in the store: the name of the part in use


def fresh_prefix(
    store: "dist.Store", rank: int, world_size: int, timeout: timedelta
) -> "dist.Store":
    """A part of the store without the addresses of processes that a restart has ended.

    A new group would call these and wait for ever (pytorch/pytorch issue 135712). Rank 0 names the
    part. The others may read the name of an old part first; so each of them asks there with a fresh
    token, and takes the part for the new one when rank 0 answers with this token.

    timeout: how long the processes wait for each other.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        part = dist.PrefixStore(token, store)
        store.set(PREFIX_KEY, token)
        for other in range(1, world_size):
            part.wait([f"asked by {other}"], timeout)
            part.set(f"answer to {other}", part.get(f"asked by {other}").decode())
        return part
    store.wait([PREFIX_KEY], timeout)
    question, answer = f"asked by {rank}", f"answer to {rank}"
    while True:
        part = dist.PrefixStore(store.get(PREFIX_KEY).decode(), store)
        part.set(question, token)
        time.sleep(0.05)
        if part.check([answer]) and part.get(answer).decode() == token:
            return part
