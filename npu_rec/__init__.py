"""npu-rec: large recommendation models on Ascend, CUDA and CPU from one tree."""

import os

__version__ = "0.1.0"

# torch would import every installed device plug-in by itself and fail with a broken one (torch_npu without CANN).
# npu_rec.device imports the one in use and says what is missing. A value that is set already is kept.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
