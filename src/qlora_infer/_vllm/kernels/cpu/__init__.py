"""Kernels for the CPU: LoRA, and operations that vLLM lacks there or computes wrongly.

Read LoRA's kernels from the outside in. ``lora.py`` is what vLLM's layers call: it knows which row uses which slot, and
chooses between compiled code and torch. ``tiles.py`` cuts the rows into fours of one adapter (the GPU's kernel uses it
too, without numba). ``rows.py`` is the compiled call: threads share tiles and blocks of columns, written for numba.
``vectors.py`` has its two innermost loops in LLVM's language. ``products.py`` uses one of them for plain products.

The innermost loops are not plain numba, because that takes 2.4 to 9 times as long at 16 rows, and torch's products take
2.5 to 12 times as long (``benchmarks/cpu_kernels.py``).
"""
