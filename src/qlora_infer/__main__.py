"""``python -m qlora_infer`` is ``qlora-infer``."""

from qlora_infer.cli import main

if __name__ == "__main__":
    main()
