"""What routing costs: tokens/s beside a plain loop of `generate`, the controller's own time, and memory.

    python tools/bench/throughput.py engine [MODEL_FOLDER] [--windows N]   # default: the bundled large model
    python tools/bench/throughput.py controller [--requests N] [--profile]
    python tools/bench/throughput.py memory [--requests N]                 # a million by default

Everything is measured side by side in one run: a machine that is busy is busy for both. SmolLM2-135M, for
`engine`, without a hub: see docs/backends.md.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command does

import psutil

import messcli.jobs.run
from messcli.files.requests import open_input, read_requests
from messcli.jobs.route import RouteConfig, route
from messcli.records import Answer, Asked, Outcome, Request
from messcli.zoo import BUNDLED_ZOO

SAMPLES = Path(__file__).parent.parent.parent / "samples" / "requests.jsonl"
BATCH = 16
MEMORY_WINDOW = 8192  # requests that are decided together


def expect(what: str, measured: str, expected: str, met: bool) -> bool:
    print(f"{'ok  ' if met else 'MISS'}  {what}: {measured} (expected {expected})", flush=True)
    return met


# --- (a) tokens per second ---


class Plain:
    """transformers called by hand."""

    def __init__(self, folder: Path, template: str, new_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.template = template
        self.options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens}
        self.options["pad_token_id"] = self.tokenizer.pad_token_id
        self.options["eos_token_id"] = self.tokenizer.eos_token_id

    def texts(self, prompts: Sequence[str]) -> list[str]:
        if not self.template:  # as messcli does where the tokenizer has one
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                for chat in chats
            ]
        return [self.template.replace("{prompt}", prompt) for prompt in prompts]

    def run(self, prompts: Sequence[str], batch: int) -> tuple[int, float]:
        """Output tokens and seconds."""
        tokens, started = 0, time.perf_counter()
        for at in range(0, len(prompts), batch):
            inputs = self.tokenizer(
                self.texts(prompts[at : at + batch]),
                return_tensors="pt",
                padding=True,
                add_special_tokens=bool(self.template),
            )
            rows = self.model.generate(**inputs, **self.options)[:, inputs["input_ids"].shape[1] :]
            self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            stop = self.tokenizer.eos_token_id
            for row in rows.tolist():
                tokens += row.index(stop) + 1 if stop in row else len(row)
        return tokens, time.perf_counter() - started

    def continuous(self, prompts: Sequence[str]) -> tuple[int, float]:
        """transformers' continuous batching, with limits set: its defaults are made for a GPU's memory."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        ids = [
            self.tokenizer(text, add_special_tokens=bool(self.template))["input_ids"]
            for text in self.texts(prompts)
        ]
        config = GenerationConfig(**self.options)
        started = time.perf_counter()
        outputs = self.model.generate_batch(
            inputs=ids,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=256, max_batch_tokens=256
            ),
            progress_bar=False,
        )
        return sum(len(out.generated_tokens) for out in outputs.values()), time.perf_counter() - started


def engine(folder: Path, windows: int, window: int, *, continuous: bool) -> bool:
    bundled = folder.parent == BUNDLED_ZOO.parent
    new_tokens = 24 if bundled else 32
    template = "{prompt} =>" if bundled else ""
    lines = [json.loads(line) for line in SAMPLES.read_text().splitlines()]
    if bundled:
        prompts = [line["prompt"] for line in lines]
    else:
        words = " ".join(line["prompt"] for line in lines).split()
        numbers = random.Random(1)
        starts = [numbers.randrange(len(words) - 90) for _ in range(600)]
        prompts = [
            "Continue the story: " + " ".join(words[at : at + numbers.randint(10, 80)]) for at in starts
        ]
    prompts = (prompts * 20)[: (windows + 1) * window]
    plain = Plain(folder, template, new_tokens)
    totals: dict[str, tuple[int, float]] = {}

    def add(name: str, measured: tuple[int, float]) -> None:
        tokens, seconds = totals.get(name, (0, 0.0))
        totals[name] = (tokens + measured[0], seconds + measured[1])

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source, output = work / "in.jsonl", work / "out.jsonl"
        source.write_text("".join(json.dumps({"id": n, "prompt": p}) + "\n" for n, p in enumerate(prompts)))
        (work / "zoo.toml").write_text(
            f'[sla]\nalpha = 0.0\nmetric = "exact"\n[[models]]\nname = "m"\npath = "{folder.resolve()}"\n'
            f'device = "cpu"\ndtype = "float32"\nmax_new_tokens = {new_tokens}\n'
            + (f'prompt_template = "{template}"\n' if template else "")
        )
        since = 0.0
        done = 0

        def between_windows(progress: Any) -> None:
            nonlocal since, done
            if progress.finished < min((done + 1) * window, len(prompts)):
                return  # rows of a window that is still at work
            seconds = time.perf_counter() - since
            part = prompts[done * window : (done + 1) * window]
            if done:  # the first window warms up
                rows = [json.loads(line) for line in output.read_text().splitlines()][-len(part) :]
                add("route", (sum(row["output_tokens"] for row in rows), seconds))
                add("plain", plain.run(part, BATCH))
                add("unbatched", plain.run(part[:: window // 8], 1))
            else:
                plain.run(part[:BATCH], BATCH)
            done += 1
            since = time.perf_counter()

        route(
            RouteConfig.of(
                input=str(source),
                output=str(output),
                zoo=str(work / "zoo.toml"),
                policy="largest",
                window=window,
                batch_size=BATCH,
                meter="estimate",
                preload=True,
            ),
            on_progress=between_windows,
        )
    if continuous:
        add("continuous", plain.continuous(prompts[window : 2 * window]))
    rate = {name: tokens / seconds for name, (tokens, seconds) in totals.items()}
    print(
        f"{folder.name}, batches of {BATCH}, {new_tokens} new tokens at most, {windows} windows of {window}:"
    )
    for name, (tokens, seconds) in totals.items():
        print(f"      {name:<11}{rate[name]:8.0f} tokens/s ({tokens} in {seconds:.1f} s)")
    kept = expect(
        "route / plain loop", f"{rate['route'] / rate['plain']:.3f}", "at least 0.97",
        rate["route"] >= 0.97 * rate["plain"],
    )  # fmt: skip
    gained = expect(
        "route / unbatched loop", f"{rate['route'] / rate['unbatched']:.1f}", "at least 5",
        rate["route"] >= 5 * rate["unbatched"],
    )  # fmt: skip
    return kept and gained


# --- (b) and (c): a zoo that answers at once ---

WORDS = [f"word{number}" for number in range(500)]
NAMES = ("a", "b", "c", "d")


class Instant:
    """Four models whose answers cost nothing; in the place of the one that loads them."""

    def __init__(self, *_: Any) -> None:
        self.names = NAMES
        self.seconds = 0.0  # spent here, which is nobody's

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return [(0, 1, 2, 3)] * len(requests)

    def answers(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        started = time.process_time()
        made = [
            (position, m, self._outcome(request, m))
            for position, (request, models) in enumerate(asked)
            for m in models
        ]
        Instant.spent += time.process_time() - started
        yield made

    def running_joules(self) -> Mapping[str, float]:
        return {}

    spent = 0.0
    fault = None
    checkers: Mapping[int, int] = {}
    named_overhead: Mapping[str, float] = {}
    loads: Mapping[str, Any] = {}

    @staticmethod
    def _outcome(request: Request, m: int) -> Outcome:
        right = len(request.prompt) % 7 <= 2 * m
        joules = (1 + m) ** 2 + len(request.prompt) / 100
        return Outcome("an answer", float(right), joules, 20, 10, 0.01, "estimate")

    def take_overhead(self) -> Mapping[str, float]:
        return {}

    def take_warnings(self) -> list[str]:
        return []

    def __enter__(self) -> Instant:
        return self

    def __exit__(self, *_: object) -> None:
        return


def write_input(path: Path, count: int) -> None:
    numbers = random.Random(1)
    with path.open("w") as file:
        for index in range(count):
            prompt = " ".join(numbers.choices(WORDS, k=15))
            file.write(f'{{"id": {index}, "prompt": "{prompt}", "reference": "x"}}\n')


def instant_zoo(work: Path) -> Path:
    tables = "".join(f'[[models]]\nname = "{name}"\npath = "org/{name}"\ndevice = "cpu"\n' for name in NAMES)
    (work / "zoo.toml").write_text(f'[sla]\nalpha = 0.6\nmetric = "exact"\n{tables}')
    return work / "zoo.toml"


def run_instant(
    work: Path, count: int, predictor: str, on_progress: Any = None, window: int | None = None
) -> float:
    """CPU seconds of a whole route, without what the models' stand-in took."""
    messcli.jobs.run.LazyLive = Instant  # type: ignore[assignment,misc]  # the models are what is left out here
    Instant.spent = 0.0
    output = work / f"{predictor}-{count}.jsonl"
    started = time.process_time()
    route(
        RouteConfig.of(
            input=str(work / f"{count}.jsonl"),
            output=str(output),
            zoo=str(instant_zoo(work)),
            predictor=predictor,
            window=window,
        ),
        on_progress=on_progress,
    )
    return time.process_time() - started - Instant.spent


def read(work: Path, count: int) -> float:
    """CPU seconds of reading the input alone."""
    started = time.process_time()
    with open_input(str(work / f"{count}.jsonl")) as handle:
        for _ in read_requests(handle, "the input"):
            pass
    return time.process_time() - started


def controller(count: int, profile: bool) -> bool:
    met = True
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        few = count // 10
        for size in (few, count):
            write_input(work / f"{size}.jsonl", size)
        for predictor in ("linear", "ridge"):
            profiler = cProfile.Profile()
            base = run_instant(work, few, predictor)
            if profile:
                profiler.enable()
            # what doesn't grow with the requests cancels out
            micros = (run_instant(work, count, predictor) - base) / (count - few) * 1e6
            profiler.disable()
            reading = (read(work, count) - read(work, few)) / (count - few) * 1e6
            met &= expect(
                f"controller, 4 models, {predictor}",
                f"{micros - reading:.0f} µs per request, and {reading:.0f} µs to read it",
                "at most 150 µs", micros - reading <= 150,
            )  # fmt: skip
            if profile:
                pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return met


def memory(count: int) -> bool:
    process = psutil.Process()
    seen: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_input(work / f"{count}.jsonl", count)

        def watch(progress: Any) -> None:
            if not seen or progress.finished >= seen[-1][0] + 3200:
                seen.append((progress.finished, process.memory_info().rss))

        seconds = run_instant(work, count, "linear", watch, MEMORY_WINDOW)
    tenth = max(rss for finished, rss in seen if finished <= count // 10)
    rest = max(rss for finished, rss in seen if finished > count // 10)
    grown = (rest - tenth) / 2**20
    print(f"      {count} lines in {seconds:.0f} CPU s; {tenth / 2**20:.0f} MiB after a tenth of them")
    limit = 40 * count / 1e6 + 20
    return expect(
        "memory gained over the other nine", f"{grown:.1f} MiB", f"at most {limit:.0f} MiB", grown <= limit
    )


def main() -> Iterator[bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["engine", "controller", "memory"])
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED_ZOO.parent / "large")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching too")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.what == "engine":
        yield engine(options.model, options.windows, options.window, continuous=options.continuous)
    elif options.what == "controller":
        yield controller(options.requests or 12_000, options.profile)
    else:
        yield memory(options.requests or 1_000_000)


if __name__ == "__main__":
    sys.exit(0 if all(main()) else 1)
