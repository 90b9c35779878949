"""The whole corpus."""

from __future__ import annotations

from corpus import beside, by_peft, refused, served, strangers

CORPUS = (*served.ENTRIES, *beside.ENTRIES, *by_peft.ENTRIES, *refused.ENTRIES, *strangers.ENTRIES)
SERVED = [entry for entry in CORPUS if entry.error is None]
REFUSED = [entry for entry in CORPUS if entry.error is not None]
