"""From a request to its outputs: what is asked, in which order it runs, and the thread that runs it."""
