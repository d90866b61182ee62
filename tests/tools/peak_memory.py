"""Run as a file in a fresh process: how much anonymous memory does an export take beside what is mapped from disk?

python peak_memory.py RUN OUT SHARD_BYTES    prints the growth of RssAnon while weights are written, and all in all
"""

import sys
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon: not Linux")


class Peak:
    """The most that was used inside the block, beyond what was used before; sampled a few hundred times a second."""

    def __enter__(self) -> "Peak":
        self.before = self.most = anonymous_bytes()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.most - self.before


def main(run: Path, out: Path, shard_bytes: int) -> None:
    from megaboat.tools import hf_export
    from megaboat.tools.hf_files import write_weights
    from megaboat.tools.loading import newest_checkpoint

    checkpoint = newest_checkpoint(run)
    (out / "weights").mkdir(parents=True)
    with Peak() as writing:
        write_weights(out / "weights", checkpoint.model(), checkpoint.config, shard_bytes)
    with Peak() as exporting:
        hf_export.export(run, out / "export", shard_bytes=shard_bytes)
    print(writing.grown, exporting.grown)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
