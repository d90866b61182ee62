"""What the server of `tests.distributed` imports for all ranks: torch's compiler too, which an optimizer asks for, and
what the modules of tests import, in one of which each rank's function lies."""

import gc

from megaboat.imports import load

PRODUCT = ("megaboat.engine.build", "torch._dynamo", "transformers.models.llama.modeling_llama")
TESTS = ("pytest", "tests.engine.equality", "tests.engine.runs")

for name in PRODUCT + TESTS:
    load(name)
gc.collect()  # once here, or each rank would go through all that was imported
