"""`python -m npu_rec`, which torchrun starts on every rank."""

from npu_rec.cli import main

main()
