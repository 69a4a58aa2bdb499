"""The GPU that a program is for: the one that is there, or the one of an abstract mesh."""

import dataclasses

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """What kernels must know.

    Attributes:
      platform: "cpu", "gpu", "tpu".
      kind: the device's name.
      cores: multiprocessors.
    """

    platform: str
    kind: str
    cores: int

    @property
    def is_hopper(self) -> bool:
        """Whether it has Hopper's tensor cores."""
        return self.platform == "gpu" and any(name in self.kind for name in HOPPER)


def without_mosaic_gpu() -> str | None:
    """Why kernels written in Mosaic GPU do not run here; None if they do."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or newer, this is {jax.__version__}"
    here = current()
    return None if here.is_hopper else f"needs a Hopper GPU, not {here.kind}"


def current() -> Device:
    """For which the program that is traced now is meant."""
    mesh = jax.sharding.get_abstract_mesh()
    if (abstract := getattr(mesh, "abstract_device", None)) is not None:
        platform = getattr(abstract, "platform", None) or "gpu"
        return Device(platform, abstract.device_kind, abstract.num_cores or HOPPER_SMS)
    device = jax.devices()[0]
    return Device(device.platform, device.device_kind, getattr(device, "core_count", None) or 1)
