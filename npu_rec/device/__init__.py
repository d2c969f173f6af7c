"""What hardware this is. Nothing above this folder asks torch_npu, torch.npu or torch.cuda.

`get_device` gives the `Device` of this process; `device_report` describes the machine for `npu-rec doctor`.
"""

from npu_rec.device.device import Device, DeviceName
from npu_rec.device.profile import CAPABILITIES, HardwareProfile
from npu_rec.device.report import device_report
from npu_rec.device.selection import card_count, get_device

__all__ = ["CAPABILITIES", "Device", "DeviceName", "HardwareProfile", "card_count", "device_report", "get_device"]
