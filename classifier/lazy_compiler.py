"""torch.optim without torch's compiler, which takes seconds to import and is hardly ever used.

Each optimiser of torch imports torch._dynamo when it is made and at each step, to tell the compiler
what not to compile. This program compiles no optimiser.
"""

from typing import Any

import torch

# Methods of torch.optim.Optimizer that the compiler is told to leave alone.
NOT_COMPILED = ["add_param_group", "zero_grad", "state_dict", "load_state_dict"]


def spare_optimizers() -> None:
    """Keep torch's optimisers from importing its compiler, if nothing else has imported it.

    This changes torch.optim for the whole process, so only programs call it. It relies on how torch
    2.11 to 2.14 decorate these methods; with another version it may do nothing.
    """
    for name in NOT_COMPILED:
        function = _undecorated(torch.optim.Optimizer, name)
        if function is not None:
            # where torch._disable_dynamo keeps the function that it has made
            function.__dynamo_disable = function
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD):
        step = _undecorated(optimizer, "step")
        is_in_use = hasattr(optimizer.step, "hooked")  # an instance has wrapped it once more
        if step is not None and not is_in_use:
            optimizer.step = torch.no_grad()(step)  # type: ignore[method-assign]


def _undecorated(owner: type, name: str) -> Any:
    """The function within a decorated method; None if that is not decorated."""
    return getattr(getattr(owner, name), "__wrapped__", None)
