"""The command `headrace`. Imports nothing heavy: `headrace --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from stages import __version__
from stages.errors import HeadraceError
from stages.torch_backends import hide_torch_npu

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one line and an exit code."""
    namespace = make_parser().parse_args(arguments)
    command: Command = namespace.command
    if getattr(namespace, "device", None) != "npu":
        hide_torch_npu()
    try:
        return command(namespace)
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Declare every subcommand."""
    from stages.settings import add_flags, add_serve_arguments
    from stages.topology import STAGES

    parser = argparse.ArgumentParser(prog="headrace", description="LLM inference server")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over the OpenAI API")
    add_serve_arguments(serve)
    serve.set_defaults(command=_serve)

    status = commands.add_parser("status", help="show the stages of a running group")
    status.add_argument("--port", type=int, default=8000, help="port of the group")
    status.add_argument("--run-dir", help="its run directory, if it was given one")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)

    replay = commands.add_parser("replay", help="feed a recording to a stage and compare")
    replay.add_argument("stage", choices=list(STAGES))
    replay.add_argument("file")
    replay.set_defaults(command=_replay)

    make_model = commands.add_parser("make-model", help="write a model with random weights")
    make_model.add_argument("--shape", required=True, help="such as qwen3-0.6b or tiny-qwen3")
    make_model.add_argument("--out", required=True, metavar="DIR")
    make_model.add_argument("--dtype", default="bfloat16")
    make_model.add_argument("--vocab-size", type=int, default=None)
    make_model.add_argument("--seed", type=int, default=0)
    make_model.set_defaults(command=_make_model)

    evaluate = commands.add_parser("eval-embedded", help="print the embedded model's accuracy")
    evaluate.add_argument("--questions", type=int, default=200, help="how many of each kind")
    evaluate.add_argument("--url", help="a server to ask (default: start one)")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there too")
    add_flags(evaluate, "quantization", "cpu_kernels")
    evaluate.set_defaults(command=_eval_embedded)

    perplexity = commands.add_parser("perplexity", help="what rounding the weights costs")
    perplexity.add_argument("model", nargs="?", help="Hugging Face folder (default: embedded)")
    perplexity.add_argument("--text", metavar="FILE", help="(default: chats of the embedded kind)")
    perplexity.add_argument("--tokens", type=int, default=4096, help="of the text at most")
    perplexity.add_argument(
        "--weights", default="", help="such as float32,int8; ratios are to the first"
    )
    perplexity.add_argument("--json", metavar="FILE", help="write the figures there too")
    add_flags(perplexity, "cpu_kernels")
    perplexity.set_defaults(command=_perplexity)

    check_model = commands.add_parser("check-model", help="how a model would run on a device")
    add_serve_arguments(check_model)
    check_model.set_defaults(command=_check_model)

    collect_env = commands.add_parser("collect-env", help="the machine, and what does not match")
    collect_env.set_defaults(command=_collect_env)

    bench = commands.add_parser("bench", help="measure")
    _add_bench_commands(bench.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _add_bench_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from stages.settings import add_flags

    steps = commands.add_parser("steps", help="what a step costs, overlapped and sequential")
    steps.add_argument("model", nargs="?", help="Hugging Face folder (default: embedded model)")
    steps.add_argument("--device", choices=("cpu", "emulated", "npu", "cuda"), default="cpu")
    steps.add_argument("--enforce-eager", action="store_true", help="record no decode steps")
    add_flags(steps, "cpu_kernels")
    steps.add_argument("--step-ms", type=float, default=10.0, help="of the emulated device")
    steps.add_argument("--token-us", type=float, default=2.0, help="of the emulated device")
    steps.add_argument("--batch", default="1,8,64,256", help="batch sizes (default: %(default)s)")
    steps.add_argument("--seconds", type=float, default=3.0, help="of a window")
    steps.add_argument("--rounds", type=int, default=2, help="windows a mode and batch size")
    steps.add_argument("--json", metavar="FILE", help="write the figures there")
    steps.add_argument("--plot", metavar="FILE", help="draw the lanes: .html, .svg or .png")
    steps.add_argument("--plot-batch", type=int, metavar="N", help="the batch size that is drawn")
    steps.set_defaults(command=_bench_steps)
    _add_bench_latency(commands)


def _add_bench_latency(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from stages.bench.latency import SETTINGS
    from stages.settings import add_flags

    latency = commands.add_parser("latency", help="prefill and decode time of the executor alone")
    latency.add_argument("model", nargs="?", help="Hugging Face folder (default: embedded model)")
    latency.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens")
    latency.add_argument("--output-len", type=int, default=32, metavar="N", help="output tokens")
    latency.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows in a step")
    latency.add_argument("--rounds", type=int, default=5, metavar="N", help="that are measured")
    latency.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them")
    latency.add_argument("--json", metavar="FILE", help="write the figures there")
    add_flags(latency, *SETTINGS)
    latency.set_defaults(command=_bench_latency)


def _serve(namespace: argparse.Namespace) -> int:
    from stages.serve import serve

    return serve({name: value for name, value in vars(namespace).items() if name != "command"})


def _status(namespace: argparse.Namespace) -> int:
    from pathlib import Path

    import msgspec

    from stages.run_dir import default_run_dir
    from stages.status import ask_status, format_status

    run_dir = Path(namespace.run_dir) if namespace.run_dir else default_run_dir(namespace.port)
    status = ask_status(run_dir)
    print(msgspec.json.encode(status).decode() if namespace.json else format_status(status))
    return 0


def _replay(namespace: argparse.Namespace) -> int:
    from pathlib import Path

    from stages.launch import load
    from stages.replay import replay
    from stages.topology import STAGES

    result = replay(namespace.stage, Path(namespace.file), load(STAGES[namespace.stage].core))
    print(
        f"{namespace.stage}: {result.num_frames} frames, {result.num_inbound} messages in, "
        f"{result.num_outbound} out: all equal"
    )
    return 0


def _make_model(namespace: argparse.Namespace) -> int:
    from stages.launch import load

    make_model = load("executor_svc.make_model:make_model")
    make_model(
        namespace.shape,
        namespace.out,
        dtype=namespace.dtype,
        vocab_size=namespace.vocab_size,
        seed=namespace.seed,
    )
    return 0


def _eval_embedded(namespace: argparse.Namespace) -> int:
    from stages.eval_embedded import eval_embedded

    flags = ["--quantization", namespace.quantization] if namespace.quantization else []
    flags += ["--cpu-kernels", namespace.cpu_kernels] if namespace.cpu_kernels else []
    return eval_embedded(namespace.questions, namespace.url, namespace.json, flags)


def _check_model(namespace: argparse.Namespace) -> int:
    import os

    from stages.launch import load
    from stages.settings import build_config

    arguments = {name: value for name, value in vars(namespace).items() if name != "command"}
    config = build_config(arguments, os.environ)
    print("\n".join(load("executor_svc.check_model:check_model")(config)))
    return 0


def _collect_env(namespace: argparse.Namespace) -> int:
    from stages.launch import load

    print("\n".join(load("executor_svc.collect_env:collect_env")()))
    return 0


def _perplexity(namespace: argparse.Namespace) -> int:
    from pathlib import Path

    from stages.launch import load
    from stages.model_folder import embedded_model
    from stages.native_library import AUTO

    print_perplexity = load("executor_svc.perplexity:print_perplexity")
    folder = Path(namespace.model) if namespace.model else embedded_model()
    code: int = print_perplexity(
        folder,
        namespace.text,
        namespace.weights,
        namespace.tokens,
        namespace.json,
        namespace.cpu_kernels or AUTO,
    )
    return code


def _bench_steps(namespace: argparse.Namespace) -> int:
    from pathlib import Path

    from stages.bench.steps import Options, bench_steps, parse_batches

    return bench_steps(
        Options(
            model=namespace.model,
            device=namespace.device,
            enforce_eager=namespace.enforce_eager,
            cpu_kernels=namespace.cpu_kernels,
            step_ms=namespace.step_ms,
            token_us=namespace.token_us,
            batches=parse_batches(namespace.batch),
            seconds=namespace.seconds,
            rounds=namespace.rounds,
            json_path=Path(namespace.json) if namespace.json else None,
            plot_path=Path(namespace.plot) if namespace.plot else None,
            plot_batch=namespace.plot_batch,
        )
    )


def _bench_latency(namespace: argparse.Namespace) -> int:
    from stages.bench.latency import bench_latency

    return bench_latency(vars(namespace))


if __name__ == "__main__":
    sys.exit(main())
