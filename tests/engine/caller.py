"""A program that makes an engine and ends in a bad way, or lives on: ``test_left_behind.py`` runs it.

    python caller.py WHAT MODEL ENGINE_ARGS ADAPTERS

It prints the folder of its temporary files, then "the caller serves" when its engine has answered.
"""

import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time

from qlora_infer import QuantizedLoRAEngine
from qlora_infer.files.scratch import scratch_folder

GREEDY = {"temperature": 0.0, "max_tokens": 8}
ENDLESS = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}


def write(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def load_for_ever(engine, source):
    while True:
        engine.load_adapter("again", source)


def fork_one_that_lives(seconds):
    """A forked process holds all that its parent holds, also the ends of pipes."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
    process.start()
    write(f"forked {process.pid}")


def main():
    faulthandler.disable()
    what, model, engine_args, adapters = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    write(scratch_folder())
    engine = QuantizedLoRAEngine(model, adapters=adapters, max_loras=2, max_model_len=512, engine_args=engine_args)
    engine.generate("my name is", GREEDY, adapter="pirate", use_tqdm=False)
    handles = [engine.add_request("Once upon a time", ENDLESS, adapter="json") for _ in range(4)]
    if what == "loads":
        threading.Thread(target=load_for_ever, args=(engine, adapters["pirate"]), daemon=True).start()
    if what == "forks":
        fork_one_that_lives(60)
    write("the caller serves")
    time.sleep(1)
    if what == "exits":
        os._exit(1)
    if what == "aborts":
        os.abort()
    time.sleep(120)
    del handles


if __name__ == "__main__":
    main()
