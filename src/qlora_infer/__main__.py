"""The program behind ``python -m qlora_infer``, the same as ``qlora-infer``."""

from qlora_infer.cli import main

if __name__ == "__main__":
    main()
