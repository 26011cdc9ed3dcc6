"""What telemetry costs beside an evaluation pass without it, and what it takes on disk.

    python benchmarks/evaluation.py [--tokens 1000000] [--repeats 3] [--threads 2] [--size 1.8m]
    python benchmarks/evaluation.py --workers 2 [--tokens 200000] [--repeats 3] [--size 1.8m]

overhead  seconds of one pass over held-out text that writes events, cube and summary, over one that adds up losses,
          steps and FLOPs from the forward pass alone. Aim: at most 1.1 at a million tokens.
bytes     of the events file per token. Aim: at most 40.
workers   how many times as fast several processes of one thread share the reading as one does it alone, with the same
          numbers. Aim: at least 0.9 for each worker.

Text and router weights are random: halting is ragged, and the numbers compress worse than a trained model's.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, interleaved, show
from setting import Setting, add_arguments, setting_from

from haltscale.model import IGNORE_INDEX, Flops, LanguageModel
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.evaluation.evaluate_split import share_by_step
from haltscale.platform.evaluation.halting_summary import summarise_halting
from haltscale.platform.evaluation.held_out import Tally, batches, read_events
from haltscale.platform.evaluation.telemetry import DECILES, EventsFile, EventsWriter, Quantiles, build_cube, write_cube
from haltscale.platform.evaluation.token_kinds import TokenClass, TokenKinds
from haltscale.platform.memory import keep_freed_memory

DOCUMENT = 4096


def text(setting: Setting, tokens: int) -> Iterator[HeldOutDocument]:
    """Documents of random tokens."""
    stream = np.random.default_rng(0)
    for index in range(max(tokens // DOCUMENT, 1)):
        drawn = stream.integers(0, setting.vocabulary, min(DOCUMENT, tokens) + 1)
        yield HeldOutDocument(name=str(index), bytes=1, tokens=drawn)


@torch.no_grad()
def without(model: LanguageModel, setting: Setting, tokens: int) -> float:
    """Seconds of a pass that knows only the loss, the steps and the FLOPs."""
    model.eval()
    loss, flops, steps, began = 0.0, Flops(), np.zeros(0, dtype=np.int64), time.perf_counter()
    for batch in batches(text(setting, tokens), setting.length, setting.sequences):
        read, targets, lengths = (torch.as_tensor(x, device=setting.device) for x in batch[:3])
        real = torch.arange(read.shape[1], device=setting.device) < lengths[:, None]
        output = model(read, targets.masked_fill(~real, IGNORE_INDEX), lengths_B=lengths)
        loss += float(output.nll_BT.sum())
        taken = np.bincount(output.trace.steps_BT[real].cpu().numpy(), minlength=output.trace.exit_BTK.shape[2])
        steps = taken + steps if len(steps) else taken
        flops += model.flops(output.trace.counts)
    return time.perf_counter() - began


def with_telemetry(model: LanguageModel, setting: Setting, tokens: int, folder: Path) -> float:
    """Seconds of a pass that also writes events, cube and summary."""
    drawn = np.random.default_rng(1)
    kinds = TokenKinds(
        frequency=drawn.integers(0, 10, setting.vocabulary).astype(np.uint8),
        look=drawn.integers(0, len(TokenClass), setting.vocabulary).astype(np.int8),
    )
    began = time.perf_counter()
    quantiles = Quantiles()
    path = folder / "events.parquet"
    writer = EventsWriter(path, kinds, step=0, context=setting.length, documents=[])
    arguments = {"context": setting.length, "batch_rows": setting.sequences, "by_step": share_by_step(tokens)}
    for events in read_events(model, text(setting, tokens), **arguments):
        quantiles.add(events.nll)
        writer.add(events)
    writer.close()
    file = EventsFile(path=path)
    edges = quantiles.at([decile / DECILES for decile in range(1, DECILES)])
    cube = build_cube(file, edges)
    write_cube(cube, edges, file.metadata, folder / "cube.parquet")
    summarise_halting(file, cube, quarters=quantiles.at([0.25, 0.75]), l_max=events.exit.shape[1] - 1)
    return time.perf_counter() - began


def shared(rank: int, world: int, setting: Setting, tokens: int, store: str, results: Any) -> None:
    """What one of several processes does: reads its share, and alone the whole, in turn; rank 0 tells how long it
    took, together and alone."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = setting.ragged()

    def read(workers: int) -> tuple[float, Tally]:
        torch.distributed.barrier()
        began, tally = time.perf_counter(), Tally()
        if rank < workers:
            asked = {"context": setting.length, "batch_rows": setting.sequences, "by_step": share_by_step(tokens)}
            for events in read_events(model, text(setting, tokens), **asked, rank=rank, world=workers):
                tally.add(events)
        return time.perf_counter() - began, tally

    for _ in range(setting.repeats + 1):
        (together, shares), (alone, whole) = read(world), read(1)
        if rank == 0:
            if shares.row(text_bytes=1) != whole.row(text_bytes=1):
                raise SystemExit("several workers read other numbers than one")
            results.put((together, alone))


def with_workers(setting: Setting, tokens: int, world: int) -> None:
    """Evaluation shared by several processes over one."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, setting, tokens, f"{folder}/store", results)
        torch.multiprocessing.spawn(shared, arguments, nprocs=world)
    pairs = [results.get() for _ in range(setting.repeats + 1)][1:]
    together, alone = (sorted(times)[len(times) // 2] for times in zip(*pairs, strict=True))
    show(
        Figure(
            name=f"evaluation on {world} workers, times as fast as on 1",
            values=[one / many for many, one in pairs],
            at_least=0.9 * world,
            detail=f"{together:.1f} s / {alone:.1f} s, {tokens:,} tokens, the same numbers",
        )
    )


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="measure sharing by so many instead")
    add_arguments(parser, sequences=16, repeats=3)
    parser.set_defaults(size="1.8m")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as evaluations and training do
    if arguments.workers > 1:
        with_workers(setting_from(arguments, threads=1), arguments.tokens, arguments.workers)
        return
    setting = setting_from(arguments, threads=arguments.threads)
    model = setting.ragged()
    with tempfile.TemporaryDirectory() as name:
        folder, tokens = Path(name), arguments.tokens
        a, b, ratios = interleaved(
            lambda: with_telemetry(model, setting, tokens, folder),
            lambda: without(model, setting, tokens),
            setting.repeats,
        )
        detail = f"{a:.1f} s / {b:.1f} s, {tokens:,} tokens"
        show(Figure(name="telemetry, time of the pass", values=ratios, at_most=1.1, detail=detail))
        size = (folder / "events.parquet").stat().st_size / tokens
        show(Figure(name="telemetry, bytes per token", values=[size], unit="bytes", at_most=40))


if __name__ == "__main__":
    main()
