"""Whether engines stay full: how much of a server's limit is in use, and vLLM beside its own `generate`.

python tools/bench/serving.py openai [--requests N]    # a stand-in for a server: 200 ms, 256 at a time
python tools/bench/serving.py vllm MODEL_FOLDER        # in an environment with vLLM: .ci/vllm makes one
python tools/bench/serving.py card                     # transformers on a card: batches, turns, memory
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from messcli.models.backend import create
from messcli.records import Request
from messcli.zoo import model_spec

LATENCY_SECONDS, LIMIT = 0.2, 256


def expect(what: str, measured: str, expected: str, met: bool) -> bool:
    print(f"{'ok  ' if met else 'MISS'}  {what}: {measured} (expected {expected})", flush=True)
    return met


# --- a server's limit ---


class Server:
    """Answers every request after the same time, in a process of its own; more than LIMIT at a time are refused."""

    def __init__(self) -> None:
        self._now = 0
        self._refused = 0
        self._answered = 0
        self._busy = 0.0  # requests under way x seconds
        self._first = self._last = 0.0

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self._first = self._first or now
        self._busy += self._now * (now - (self._last or now))
        self._now, self._last = self._now + change, now

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = {"choices": [{"message": {"content": "an answer"}, "finish_reason": "stop"}]}
        answer["usage"] = {"prompt_tokens": 20, "completion_tokens": 10}  # type: ignore[assignment]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                status, body = "200 OK", json.dumps(answer).encode()
                if head.startswith("get /figures"):
                    used = self._busy / LIMIT / (self._last - self._first or 1.0)
                    body = json.dumps([used, self._answered, self._refused]).encode()
                    self._busy = self._first = self._last = 0.0
                    self._answered = self._refused = 0
                elif head.startswith("post"):
                    if self._now < LIMIT:
                        self._count(1)
                        await asyncio.sleep(LATENCY_SECONDS)
                        self._count(-1)
                        self._answered += 1
                    else:
                        self._refused += 1
                        status, body = "429 Too Many Requests", b"{}"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def serve(port: Any) -> None:
    async def run() -> None:
        server = await asyncio.start_server(Server().handle, "127.0.0.1", 0, backlog=4096)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def figures(url: str) -> tuple[float, int, int]:
    import urllib.request

    with urllib.request.urlopen(url.removesuffix("/v1") + "/figures") as answer:  # noqa: S310  # ours
        used, answered, refused = json.load(answer)
    return used, answered, refused


def openai(count: int) -> bool:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(port,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port.get()}/v1"
    met = True
    try:
        for name, many, concurrency, least in (
            ("stated", count, LIMIT, 0.9), ("found", 10 * count, None, 0.8),
        ):  # fmt: skip
            backend = create(
                model_spec(name="m", path="m", backend="openai", base_url=url, concurrency=concurrency),
                batch_size=None,
            )
            backend.load()
            figures(url)
            asked = [Request(n, "How long is a piece of string? " * 4) for n in range(many)]
            started = time.process_time()
            answers = [answer for group in backend.stream(asked) for _, answer in group.finished]
            micros = (time.process_time() - started) / many * 1e6
            used, answered, refused = figures(url)
            backend.unload()
            assert answered == many == sum(answer.error is None for answer in answers)
            met &= expect(
                f"{many} requests, concurrency {name}: of a limit of {LIMIT} in use",
                f"{used:.3f} ({refused} refused for being too many, {micros:.0f} µs of CPU time a request)",
                f"at least {least}", used >= least,
            )  # fmt: skip
    finally:
        process.terminate()
    return met


# --- vLLM beside itself ---

QUESTIONS = (
    "Answer with one word. What is the capital of {0}?",
    "Say yes or no: is {0} larger than {1}?",
    "Name three things that one buys in {0}.",
    "Write two sentences about {0}.",
    "Write a long story about a journey from {0} to {1}.",
)
PLACES = [
    "Italy", "France", "Norway", "Chile", "Kenya", "Japan", "Peru", "Spain",
    "Ghana", "Nepal", "Cuba", "Mali", "Oman", "Fiji", "Chad", "Laos",
]  # fmt: skip
NEW_TOKENS = 200


def vllm(folder: Path, count: int, rounds: int) -> bool:
    """`route --policy largest` beside LLM.generate on all prompts at once, one after the other."""
    numbers = random.Random(1)
    prompts = [numbers.choice(QUESTIONS).format(*numbers.sample(PLACES, 2)) for _ in range(count)]
    prompts = [f"{prompt} ({n})" for n, prompt in enumerate(prompts)]  # no two alike
    plain, ours, lengths = [0, 0.0], [0, 0.0], []
    for _ in range(rounds):
        tokens, seconds = _generate(folder, prompts)
        plain = [plain[0] + tokens, plain[1] + seconds]
        told, seconds = _route(folder, prompts)
        ours, lengths = [ours[0] + sum(told), ours[1] + seconds], told
    rates = [tokens / seconds for tokens, seconds in (ours, plain)]
    print(f"      {count} prompts, answers of {min(lengths)} to {max(lengths)} tokens, {rounds} rounds")
    for name, rate, (tokens, seconds) in zip(("route", "generate"), rates, (ours, plain), strict=True):
        print(f"      {name:<9}{rate:7.1f} tokens/s ({tokens} in {seconds:.1f} s)")
    ratio = rates[0] / rates[1]
    return expect("route / LLM.generate", f"{ratio:.3f}", "at least 0.95", ratio >= 0.95)


def _generate(folder: Path, prompts: list[str]) -> tuple[int, float]:
    """Output tokens and seconds of vLLM by itself."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=2048
    )
    chats = [
        engine.get_tokenizer().apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    options = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    engine.generate(chats[:1], options, use_tqdm=False)
    started = time.perf_counter()
    outputs = engine.generate(chats, options, use_tqdm=False)
    seconds = time.perf_counter() - started
    engine.llm_engine.engine_core.shutdown()
    return sum(len(output.outputs[0].token_ids) for output in outputs), seconds


def _route(folder: Path, prompts: list[str]) -> tuple[list[int], float]:
    """Output tokens of each answer, and the seconds from the engine's start to the last row."""
    from messcli.jobs.config import RouteConfig
    from messcli.jobs.route import route
    from messcli.models.vllm import VllmBackend

    ready: list[float] = []
    load = VllmBackend.load

    def timed(self: VllmBackend) -> None:
        load(self)
        if not ready:
            ready.append(0.0)
            self.generate([Request("warm-up", prompts[0])])
            ready[0] = time.perf_counter()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "zoo.toml").write_text(
            f'[sla]\nalpha = 0.0\nmetric = "exact"\n[[models]]\nname = "m"\npath = "{folder.resolve()}"\n'
            f'device = "cpu"\ndtype = "float32"\nbackend = "vllm"\nmemory_share = 0.2\n'
            f"max_new_tokens = {NEW_TOKENS}\n[models.load]\nenforce_eager = true\nmax_model_len = 2048\n"
        )
        lines = [json.dumps({"id": n, "prompt": prompt}) for n, prompt in enumerate(prompts)]
        (work / "in.jsonl").write_text("\n".join(lines) + "\n")
        output = work / "out.jsonl"
        last = 0.0

        def progress(_: Any) -> None:
            nonlocal last
            last = time.perf_counter()

        VllmBackend.load = timed  # type: ignore[method-assign]
        try:
            route(
                RouteConfig.of(
                    str(work / "in.jsonl"), str(output), zoo=str(work / "zoo.toml"), policy="largest",
                    window=len(prompts), meter="estimate", preload=True,
                ),
                on_progress=progress,
            )  # fmt: skip
        finally:
            VllmBackend.load = load  # type: ignore[method-assign]
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [row["output_tokens"] for row in rows], last - ready[0]


# --- transformers on a card ---


def card_model(folder: Path, layers: int, hidden: int) -> None:
    """A Llama of random weights in bfloat16; 16 layers of 2048 are a billion parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(32_000 - 4))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 512), pad_token_id=0,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)


def card_backend(folder: Path, tokens: int, **more: Any) -> Any:
    spec = model_spec(
        name=folder.name, path=str(folder), device="cuda:0", dtype="bfloat16", max_new_tokens=tokens, **more
    )
    return create(spec, batch_size=None)


def stream_rate(backend: Any, asked: list[Request]) -> tuple[float, int]:
    """Tokens per second, and the largest batch."""
    started = time.perf_counter()
    groups = [group for group in backend.stream(asked) if group.finished]
    tokens = sum(answer.output_tokens for group in groups for _, answer in group.finished)
    return tokens / (time.perf_counter() - started), max(len(group.finished) for group in groups)


def card() -> bool:
    import torch

    numbers = random.Random(1)
    asked = [
        Request(n, " ".join(f"w{numbers.randrange(9000)}" for _ in range(numbers.randint(20, 200))))
        for n in range(1024)
    ]
    met = True
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        card_model(small, 16, 2048)
        card_model(large, 32, 4096)
        torch.cuda.empty_cache()
        for check, folder in ((batches, small), (plain_loop, small), (full_memory, small), (turns, large)):
            met &= check(folder, asked)
            torch.cuda.empty_cache()
    return met


def batches(folder: Path, asked: list[Request]) -> bool:
    """Batches as large as memory allows, beside batches of 64."""
    rates = []
    for more in ({"batch_size": 64}, {}):
        backend = card_backend(folder, 64, **more)
        backend.load()
        backend.generate(asked[:64])
        rate, rows = stream_rate(backend, asked)
        print(f"      1 B parameters, batches of {rows}: {rate:.0f} tokens/s", flush=True)
        rates.append(rate)
        backend.unload()
    ratio = rates[1] / rates[0]
    return expect("batches by memory / batches of 64", f"{ratio:.2f}", "at least 1", ratio >= 1)


def plain_loop(folder: Path, asked: list[Request]) -> bool:
    """The stream, log-probabilities and all, beside a loop of generate over the same batches."""
    import torch
    from transformers import AutoModelForCausalLM

    backend = card_backend(folder, 64, batch_size=256)
    backend.load()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
    order = sorted(asked, key=lambda request: -len(request.prompt.split()))
    tokenizer = backend.checkpoint.tokenizer
    tokenizer.padding_side = "left"

    def loop() -> float:
        started, tokens = time.perf_counter(), 0
        for at in range(0, len(order), 256):
            prompts = [request.prompt for request in order[at : at + 256]]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to("cuda")
            inputs.pop("token_type_ids", None)
            rows = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
            for row in rows[:, inputs["input_ids"].shape[1] :].tolist():
                tokens += row.index(2) + 1 if 2 in row else len(row)
            tokenizer.batch_decode(rows)
        return tokens / (time.perf_counter() - started)

    pairs = [(stream_rate(backend, asked)[0], loop()) for _ in range(4)][1:]
    ours, theirs = (sum(column) / len(column) for column in zip(*pairs, strict=True))
    backend.unload()
    print(f"      stream {ours:.0f} tokens/s, plain loop {theirs:.0f}, batches of 256")
    return expect("stream / plain loop", f"{ours / theirs:.3f}", "at least 0.97", ours >= 0.97 * theirs)


def full_memory(folder: Path, asked: list[Request]) -> bool:
    """Memory runs out for real, in the middle of a batch that was too large from the start."""
    import torch

    backend = card_backend(folder, 512, batch_size=1024)
    backend.load()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 3 * 2**30, dtype=torch.uint8, device="cuda")
    sizes, failed = [], 0
    for group in backend.stream(asked):
        sizes.append(len(group.finished))
        failed += sum(answer.error is not None for _, answer in group.finished)
    del hog
    backend.unload()
    print(f"      3 GiB free: groups of {sizes}")
    answered = sum(sizes) - failed
    return expect("1,024 at once with 3 GiB free: answered", f"{answered}", "1024", answered == len(asked))


def turns(folder: Path, asked: list[Request]) -> bool:
    """A model of 7 billion parameters leaves the card and comes back."""
    import torch

    backend = card_backend(folder, 64)
    seconds: dict[str, float] = {}

    def timed(what: str, work: Any) -> None:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds[what] = time.perf_counter() - started

    timed("load", backend.load)
    before = backend.generate(asked[:2])
    timed("suspend", backend.suspend)
    left = torch.cuda.memory_allocated() / 2**30
    timed("resume", backend.resume)
    same = backend.generate(asked[:2]) == before
    timed("unload", backend.unload)
    timed("load again", backend.load)
    print("      7 B parameters: " + ", ".join(f"{what} {took:.2f} s" for what, took in seconds.items()))
    ratio = seconds["resume"] / seconds["load again"]
    met = expect("resume / load again", f"{ratio:.2f}", "below 1", ratio < 1)
    met &= expect("GiB left on the card while suspended", f"{left:.2f}", "at most 0.1", left <= 0.1)
    return met & expect("answers after it", "the same" if same else "others", "the same", same)


def main() -> Iterator[bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["openai", "vllm", "card"])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.what == "openai":
        yield openai(options.requests or 2000)
    elif options.what == "card":
        yield card()
    elif options.model is None:
        parser.error("name a model's folder")
    else:
        yield vllm(options.model, options.requests or 256, options.rounds)


if __name__ == "__main__":
    sys.exit(0 if all(main()) else 1)
