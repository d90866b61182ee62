"""What the server of `tests.distributed` imports for all ranks: torch's compiler too, which an optimizer asks for."""

import gc

from megaboat.imports import load

for name in ("megaboat.engine.build", "torch._dynamo", "transformers.models.llama.modeling_llama"):
    load(name)
gc.collect()  # once here, or each rank would go through all that was imported
