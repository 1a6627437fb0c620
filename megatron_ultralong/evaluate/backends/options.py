"""The model on an evaluation's command line: the same options for every benchmark."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ultralong.config import Parallel, parse_count
from megatron_ultralong.errors import UserError

if TYPE_CHECKING:
    from megatron_ultralong.evaluate.backends.protocol import Backend


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_backend` reads, of a model that answers. --seed is the benchmark's own."""
    model = add_weights_arguments(parser, answers=True)
    model.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="prompts at a time (default: as many as make 16K tokens; 64 with an endpoint)",
    )
    model.add_argument(
        "--chat",
        default="auto",
        choices=("auto", "yes", "no"),
        help="use the chat template (default: where there is one)",
    )
    model.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 = greedy (default)")
    model.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens with this probability together",
    )
    model.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="sample among so many likeliest tokens; 0 = all (default)",
    )

    server = parser.add_argument_group("endpoint")
    server.add_argument(
        "--base-url", metavar="URL", help="like http://localhost:8000/v1 or https://api.openai.com/v1"
    )
    server.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key (default: %(default)s)",
    )
    server.add_argument(
        "--api",
        default="chat",
        choices=("chat", "completions"),
        help="chat messages, or whole prompts as token ids, exact to the token (default: %(default)s)",
    )
    server.add_argument(
        "--prefill",
        default="user",
        choices=("user", "assistant"),
        help="with chat, where an answer's first words go: into the user's message, or an assistant message that the server "
        "goes on from (vLLM, Claude) (default: %(default)s)",
    )
    server.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    server.add_argument(
        "--timeout", type=float, default=1800, metavar="S", help="seconds for one try (default: %(default)s)"
    )
    server.add_argument(
        "--retries", type=int, default=6, metavar="N", help="tries after the first (default: %(default)s)"
    )


def add_weights_arguments(
    parser: argparse.ArgumentParser, *, answers: bool = False
) -> argparse._ArgumentGroup:
    """What `open_backend` reads, of a model whose weights are at hand; `answers`: which may be behind an
    endpoint too."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR or NAME" if answers else "DIR",
        help="Hugging Face model directory" + ("; with --base-url the model's name there" if answers else ""),
    )
    model.add_argument(
        "--ckpt",
        type=Path,
        metavar="CKPT",
        help="instead: a training checkpoint, a run directory or one iteration",
    )
    engines = ("auto", "hf", "megatron", *(["endpoint"] if answers else []))
    model.add_argument(
        "--engine",
        default="auto",
        choices=engines,
        help="plain transformers; our own model, over the ranks of torchrun"
        + ("; an OpenAI-compatible endpoint" if answers else "")
        + f" (default: {'endpoint with --base-url, ' if answers else ''}megatron with --ckpt, a layout or several ranks, else hf)",
    )
    model.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="directory of the tokenizer (default: the model's)"
        + ("; an endpoint needs it: lengths are measured with it" if answers else ""),
    )
    model.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="weights and activations (default: as stored, bf16 with megatron, but fp32 on a CPU)",
    )
    if not answers:
        parser.set_defaults(
            base_url=None, batch=None, chat="auto", temperature=0.0, top_p=1.0, top_k=0, seed=0
        )

    ranks = parser.add_argument_group("layout, with --engine megatron")
    for name, words in (("tp", "tensor parallel ranks"), ("pp", "pipeline parallel ranks")):
        ranks.add_argument(f"--{name}", type=int, metavar="N", help=f"{words} (default: 1)")
    ranks.add_argument(
        "--cp", type=int, metavar="N", help="context parallel ranks (default: what is left of torchrun's)"
    )
    ranks.add_argument(
        "--read-chunk",
        default="16K",
        metavar="N",
        help="tokens of a prompt read at a time, by all ranks (default: %(default)s)",
    )
    return model


@contextlib.contextmanager
def open_backend(args: argparse.Namespace) -> Iterator[Backend]:
    """The model that `args` name. Under torchrun only rank 0 gets it: the others work for it until the end,
    and leave. UserError for options that do not fit together, and for what the back-end cannot load."""
    if args.batch is not None and args.batch < 1:
        raise UserError("--batch must be at least 1")
    engine = _engine(args)
    backend = {"hf": _hugging_face, "megatron": _megatron, "endpoint": _endpoint}[engine](args)
    try:
        yield backend
    finally:
        backend.close()


@contextlib.contextmanager
def no_backend() -> Iterator[None]:
    """In place of `open_backend` where no model is asked: under torchrun too only rank 0 goes on."""
    if int(os.environ.get("RANK", "0")):
        raise SystemExit(0)
    yield None


def check_greedy(args: argparse.Namespace) -> None:
    """UserError where sampled answers are asked for, of a benchmark that reads greedy ones."""
    if args.temperature:
        raise UserError(
            f"--temperature {args.temperature:g}: this benchmark's answers are greedy; leave it out"
        )


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer that prompts are made with where no model is opened."""
    from megatron_ultralong.evaluate.backends import protocol as backends

    path = args.tokenizer or (None if args.base_url or args.model is None else Path(args.model))
    if path is None:
        raise UserError("give --tokenizer DIR: prompts are measured with it")
    return backends.load_tokenizer(path, "--tokenizer" if args.tokenizer else "--model")


def _engine(args: argparse.Namespace) -> str:
    """The engine asked for, or the one that the other options mean."""
    world, layout = (
        int(os.environ.get("WORLD_SIZE", "1")),
        [name for name in ("tp", "pp", "cp") if getattr(args, name) is not None],
    )
    engine = args.engine
    if engine == "auto":
        engine = "endpoint" if args.base_url else "megatron" if args.ckpt or layout or world > 1 else "hf"
    if engine != "megatron":
        if args.ckpt:
            raise UserError(
                f"--ckpt is read by --engine megatron, not by {engine}; for another, export it (tools/convert_hf.py export)"
            )
        if layout:
            raise UserError(f"--{layout[0]} is for --engine megatron, not for {engine}")
        if world > 1:
            raise UserError(f"--engine {engine} is one process; start it without torchrun")
    if args.base_url and engine != "endpoint":
        raise UserError(f"--base-url is for --engine endpoint, not for {engine}")
    if (args.model is None) == (args.ckpt is None):
        raise UserError(
            "give --model DIR, or --ckpt CKPT" if args.model is None else "give --model or --ckpt, not both"
        )
    return engine


def _sampling(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from megatron_ultralong.evaluate.backends.sampling import Sampling

    return Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)


def _hugging_face(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.transformers_model import HuggingFace

    return HuggingFace(
        Path(args.model),
        device=args.device,
        dtype=args.dtype,
        chat=args.chat,
        sampling=_sampling(args),
        tokenizer=args.tokenizer,
    )


def _megatron(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.parallel_model import Megatron
    from megatron_ultralong.evaluate.backends.protocol import read_config

    tp, pp = (1 if size is None else size for size in (args.tp, args.pp))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chunk = parse_count(args.read_chunk, "--read-chunk")
    if chunk < 1:
        raise UserError("--read-chunk must be at least 1")
    if args.model is not None:
        read_config(Path(args.model))
    parallel = Parallel(
        tp=tp, pp=pp, cp=args.cp if args.cp is not None else max(1, world // max(1, tp * pp)), dp=1
    )
    if tp * pp * parallel.cp != world:
        raise UserError(
            f"--tp {tp} x --pp {pp} x --cp {parallel.cp} needs {tp * pp * parallel.cp} ranks, but {world} were started; change "
            "torchrun's --nproc-per-node or the layout"
        )
    backend = Megatron(
        path=args.ckpt or Path(args.model),
        parallel=parallel,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=args.dtype,
        chat=args.chat,
        sampling=_sampling(args),
        chunk=chunk,
    )
    if not backend.ranks.is_main:
        backend.follow()
        raise SystemExit(0)
    return backend


def _endpoint(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.openai_endpoint import Endpoint, Server

    if args.base_url is None:
        raise UserError("--engine endpoint needs --base-url URL")
    if args.tokenizer is None:
        raise UserError(
            "--base-url needs --tokenizer DIR: lengths are measured with it, the model's own where you have it, any other else"
        )
    server = Server(
        model=args.model,
        **{
            name: getattr(args, name)
            for name in ("base_url", "key_env", "api", "prefill", "concurrency", "timeout", "retries")
        },
    )
    return Endpoint(server, args.tokenizer, chat=args.chat, sampling=_sampling(args))
