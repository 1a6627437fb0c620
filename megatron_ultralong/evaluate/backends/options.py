"""Command-line options of the model under evaluation, the same for every benchmark."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.config import Parallel
from megatron_ultralong.errors import UserError

if TYPE_CHECKING:
    from megatron_ultralong.evaluate.backends.protocol import Backend
    from megatron_ultralong.evaluate.backends.sampling import Sampling


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_backend` reads for a model that generates answers. --seed belongs to the
    benchmark."""
    model = add_local_model_arguments(parser, endpoint=True)
    model.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="prompts per batch (default: as many as make 16K tokens; 64 with an endpoint)",
    )
    model.add_argument(
        "--chat",
        default="auto",
        choices=("auto", "yes", "no"),
        help="use the tokenizer's chat template (default: where it has one)",
    )
    model.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy (default)"
    )
    model.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the most likely tokens with this total probability",
    )
    model.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="sample among the N most likely tokens; 0 = all (default)",
    )

    endpoint = parser.add_argument_group("endpoint")
    endpoint.add_argument(
        "--base-url", metavar="URL", help="for example http://localhost:8000/v1 or https://api.openai.com/v1"
    )
    endpoint.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that contains the API key (default: %(default)s)",
    )
    endpoint.add_argument(
        "--api",
        default="chat",
        choices=("chat", "completions"),
        help="send chat messages, or complete prompts as token ids, exact to the token (default: %(default)s)",
    )
    endpoint.add_argument(
        "--prefill",
        default="user",
        choices=("user", "assistant"),
        help="with chat, where the answer's first words go: into the user message, or into an assistant message that the server "
        "continues (vLLM, Claude) (default: %(default)s)",
    )
    endpoint.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="concurrent requests (default: %(default)s)"
    )
    endpoint.add_argument(
        "--timeout", type=float, default=1800, metavar="S", help="seconds per attempt (default: %(default)s)"
    )
    endpoint.add_argument(
        "--retries", type=int, default=6, metavar="N", help="attempts after the first (default: %(default)s)"
    )


def add_local_model_arguments(
    parser: argparse.ArgumentParser, *, endpoint: bool = False
) -> argparse._ArgumentGroup:
    """Add the options that `open_backend` reads for a model with local weights. endpoint: the model may also
    be behind an endpoint."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR or NAME" if endpoint else "DIR",
        help="Hugging Face model directory"
        + ("; with --base-url, the model's name there" if endpoint else ""),
    )
    model.add_argument(
        "--load",
        type=Path,
        metavar="CKPT",
        help="instead of --model: a training checkpoint, either a run directory or one iteration",
    )
    engines = ("auto", "hf", "megatron", *(["endpoint"] if endpoint else []))
    model.add_argument(
        "--engine",
        default="auto",
        choices=engines,
        help="hf = plain transformers; megatron = this project's model over the ranks of torchrun"
        + ("; endpoint = an OpenAI-compatible endpoint" if endpoint else "")
        + f" (default: {'endpoint with --base-url, ' if endpoint else ''}megatron with --load, a layout or "
        "several ranks, otherwise hf)",
    )
    model.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="directory of the tokenizer (default: the model's)"
        + ("; required with an endpoint, to measure lengths" if endpoint else ""),
    )
    model.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where available)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="weights and activations (default: as stored, bf16 with megatron; fp32 on a CPU)",
    )
    if not endpoint:
        parser.set_defaults(
            base_url=None, batch=None, chat="auto", temperature=0.0, top_p=1.0, top_k=0, seed=0
        )

    layout = parser.add_argument_group("layout, with --engine megatron")
    for name, description in (("tp", "tensor parallel ranks"), ("pp", "pipeline parallel ranks")):
        layout.add_argument(f"--{name}", type=int, metavar="N", help=f"{description} (default: 1)")
    layout.add_argument(
        "--cp",
        type=int,
        metavar="N",
        help="context parallel ranks (default: the remaining ranks of torchrun)",
    )
    layout.add_argument(
        "--read-chunk",
        default="16K",
        metavar="N",
        help="tokens of a prompt that all ranks read at a time (default: %(default)s)",
    )
    return model


@contextlib.contextmanager
def open_backend(args: argparse.Namespace) -> Iterator[Backend]:
    """Open the model that `args` specify. Under torchrun only rank 0 enters the block: the other ranks work
    for it until its end, and exit. UserError for options that do not fit together, and where the model cannot
    be loaded."""
    if args.batch is not None and args.batch < 1:
        raise UserError("--batch must be at least 1")
    backend = {"hf": _transformers_model, "megatron": _parallel_model, "endpoint": _openai_endpoint}[
        _engine(args)
    ](args)
    try:
        yield backend
    finally:
        backend.close()


@contextlib.contextmanager
def no_backend() -> Iterator[None]:
    """Replace `open_backend` where no model is needed: under torchrun, too, only rank 0 continues."""
    if int(os.environ.get("RANK", "0")):
        raise SystemExit(0)
    yield None


def batch_size(args: argparse.Namespace) -> int | None:
    """Prompts per batch; None = the default of 16K tokens."""
    return args.batch or (64 if args.base_url else None)


def check_greedy(args: argparse.Namespace) -> None:
    """UserError where sampled answers are requested of a benchmark with greedy ones."""
    if args.temperature:
        raise UserError(f"--temperature {args.temperature:g}: this benchmark's answers are greedy; omit it")


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Load the tokenizer that prompts are made with where no model is opened."""
    from megatron_ultralong.evaluate.backends import model_files

    path = args.tokenizer or (None if args.base_url or args.model is None else Path(args.model))
    if path is None:
        raise UserError("give --tokenizer DIR: it is needed to measure the prompts")
    return model_files.load_tokenizer(path, "--tokenizer" if args.tokenizer else "--model")


def _engine(args: argparse.Namespace) -> str:
    """The engine that is requested, or that the other options imply."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = [name for name in ("tp", "pp", "cp") if getattr(args, name) is not None]
    engine = args.engine
    if engine == "auto":
        engine = "endpoint" if args.base_url else "megatron" if args.load or layout or world > 1 else "hf"
    if engine != "megatron":
        if args.load:
            raise UserError(
                f"--load requires --engine megatron, not {engine}; for {engine}, export it (`ultralong convert export`)"
            )
        if layout:
            raise UserError(f"--{layout[0]} requires --engine megatron, not {engine}")
        if world > 1:
            raise UserError(f"--engine {engine} runs in one process; start it without torchrun")
    if args.base_url and engine != "endpoint":
        raise UserError(f"--base-url requires --engine endpoint, not {engine}")
    if (args.model is None) == (args.load is None):
        raise UserError(
            "give --model DIR, or --load CKPT" if args.model is None else "give --model or --load, not both"
        )
    return engine


def _sampling(args: argparse.Namespace) -> Sampling:
    from megatron_ultralong.evaluate.backends.sampling import Sampling

    return Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)


def _transformers_model(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    return TransformersModel(
        Path(args.model),
        device=args.device,
        dtype=args.dtype,
        chat=args.chat,
        sampling=_sampling(args),
        tokenizer=args.tokenizer,
    )


def _parallel_model(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.model_files import read_config
    from megatron_ultralong.evaluate.backends.parallel_model import ParallelModel

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
    backend = ParallelModel(
        path=args.load or Path(args.model),
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


def _openai_endpoint(args: argparse.Namespace) -> Backend:
    from megatron_ultralong.evaluate.backends.openai_endpoint import EndpointSettings, OpenAIEndpoint

    if args.base_url is None:
        raise UserError("--engine endpoint needs --base-url URL")
    if args.tokenizer is None:
        raise UserError(
            "--base-url needs --tokenizer DIR to measure lengths: the model's own where you have it, otherwise any other"
        )
    names = ("base_url", "key_env", "api", "prefill", "concurrency", "timeout", "retries")
    settings = EndpointSettings(model=args.model, **{name: getattr(args, name) for name in names})
    return OpenAIEndpoint(settings, args.tokenizer, chat=args.chat, sampling=_sampling(args))
