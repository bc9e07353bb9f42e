"""Complete models of which a device map leaves layers in host memory or on disk, from where each call fetches them.

Accelerate's hooks fetch a module's weights when the module is called. A student is used by its methods as well, so its
weights, which are few, stay on the device where its layer computes.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import nn

from trenchcoat.config import UserError
from trenchcoat.models.attach import students_of


def keep_students_on_device(model: nn.Module) -> None:
    """Fetch the weights of every student for good."""
    for student in students_of(model).values():
        for module in student.modules():
            hook: Any = getattr(module, "_hf_hook", None)
            if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
                fetched = {name: hook.weights_map[name] for name, _ in module.named_parameters(recurse=False)}
                remove_hook_from_module(module)
                for name, tensor in fetched.items():
                    here = tensor.to(device=torch.device(hook.execution_device), dtype=torch.float32)
                    setattr(module, name, nn.Parameter(here, requires_grad=False))


def require_whole(model: nn.Module) -> None:
    """Raise ``UserError`` for a base model with weights that a device map has left on the host or on disk."""
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise UserError(
            f"device_map leaves weights off their device ({away}), and an adapter needs its base's weights there: "
            "write a complete model first (`trenchcoat export DIR --merge --out FOLDER`), which can be offloaded; or "
            "map every layer to a device that holds it, or load in 4 bits (quantization_config)"
        )
