"""``toolmem generate``: ask a trained model, tools in the loop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.compiling import compiled_engine
from toolmem.cli.functions import call
from toolmem.console import ROLE_STYLES, progress, stdout
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error
from toolmem.jsonl import completed_rows, failed_rows, read_prompts, replace_rows
from toolmem.models.kernel_choice import KernelChoice

if TYPE_CHECKING:
    from toolmem.generation import Generated, Sampler
    from toolmem.run import Run


def generate(
    checkpoint: str,
    prompt: str | None = None,
    prompts: str | None = None,
    out: str | None = None,
    factbase: str | None = None,
    allow_other_factbase: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    ranks: int = 1,
    compile: bool = False,
    attention: KernelChoice = "auto",
    device: str = "cpu",
) -> None:
    """Ask a trained model one question, or a file of them; tools answer its queries.

    Args:
        checkpoint: a run's folder, or a .ckpt file.
        prompt: one question; the dialogue is streamed to the screen.
        prompts: a JSONL file of rows {"prompt": "..."}; needs --out.
        out: the JSONL file to write, one row a prompt, in order; goes on where it was killed, and asks
            again what failed.
        factbase: the DuckDB file that queries go to (default: facts.duckdb in the run's folder).
        allow_other_factbase: accept a factbase whose facts are not those of training.
        max_new_tokens: tokens that the model may write.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the samples; row i of a file uses seed + i.
        ranks: processes that share a file's prompts, and this one's threads; the rows are the same.
        compile: decode by torch.compile, which takes a while first; its seconds are told apart.
        attention: what runs attention: sdpa (torch's own, and C of ours), flex (FlexAttention), flash
            (the package flash-attn, on CUDA), plain (the reference), or the one for the device (auto).
        device: where the model runs.
    """
    if (prompt is None) == (prompts is None):
        raise ToolmemError("give either --prompt TEXT or --prompts FILE.jsonl")
    if (prompts is None) != (out is None):
        raise ToolmemError("--prompts FILE.jsonl and --out FILE.jsonl go together")
    if ranks < 1 or (ranks > 1 and prompts is None):
        raise ToolmemError(f"--ranks {ranks}: it must be at least 1, and above 1 needs --prompts")
    if ranks > 1 and compile:
        raise ToolmemError("--compile is for one process: leave it or --ranks out")
    from toolmem.generation import Greedy, Sampling
    from toolmem.run import load

    if temperature < 0:
        raise ToolmemError(f"--temperature {temperature}: it must be 0 or above")
    sampler: Sampler = (
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p) if temperature else Greedy()
    )
    run = load(
        checkpoint,
        factbase=factbase,
        allow_other_factbase=allow_other_factbase,
        attention=attention,
        device=device,
    )
    options: dict[str, Any] = {"sampler": sampler, "max_new_tokens": max_new_tokens}
    lanes = {} if prompt is None else {"max_lanes": 1}
    with compiled_engine(run, compile, **lanes) as engine:
        if engine is not None:
            options["engine"] = engine
        if prompt is not None:
            show_stream(run, prompt, seed, options)
        elif prompts is not None and out is not None:
            answer_file(run, Path(prompts), Path(out), seed, ranks, options)


def show_stream(run: Run, question: str, seed: int, options: dict[str, Any]) -> None:
    """Print a dialogue as it comes, roles coloured; options of ``Run.stream``."""
    from toolmem.generation.transcript import Transcript

    console = stdout()
    shown: str | None = None

    def show(role: str, text: str) -> None:
        nonlocal shown
        if role != shown:
            console.print(("\n" if shown else "") + f"{role:>9}: ", style=ROLE_STYLES[role], end="")
            shown = role
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    show("user", question)
    transcript = Transcript(run.tokenizer)
    for token, role in run.stream(question, seed=seed, **options):
        for piece in transcript.add(token, role, None):
            if piece.text:
                show(piece.role, piece.text)
    if (rest := transcript.finish()).text:
        show(rest.role, rest.text)
    console.print()


def answer_file(
    run: Run, prompts: Path, out: Path, seed: int, n_ranks: int, options: dict[str, Any]
) -> None:
    """Answer every row of a JSONL file, in order, going on where an earlier call was killed.

    Args:
        run: is asked.
        prompts: the file of them.
        out: the file of answers.
        seed: of the first row.
        n_ranks: processes.
        options: of ``Run.ask_each``.

    Raises:
        ToolmemError: at the end, when some dialogues failed; their rows say why.
    """
    if out.resolve() == prompts.resolve():
        raise ToolmemError(f"--out {out} is the file of prompts itself: name another")
    questions = read_prompts(prompts)
    done = completed_rows(out, questions)
    failed = list(failed_rows(out))
    again = out.with_name(f"{out.name}.again")  # answers to what failed, until all are there
    asked_again = [questions[number] for number in failed]
    try:
        begun = completed_rows(again, asked_again)
    except ToolmemError:  # what failed before is not what failed now
        again.unlink()
        begun = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress())
            known = done - len(failed) + begun
            task = bar.add_task("generating", total=len(questions), completed=known)
            if n_ranks > 1 and known < len(questions):
                options = options | {"ranks": stack.enter_context(run.ranks(n_ranks))}

            def answer(numbers: Sequence[int], path: Path) -> None:
                asked = [questions[number] for number in numbers]
                seeds = [seed + number for number in numbers]
                with open(path, "a", encoding="utf-8") as stream:
                    answers = run.ask_each(asked, seed=seeds, **options)
                    for question, generated in zip(asked, answers, strict=True):
                        line = json.dumps(row(run, question, generated), ensure_ascii=False)
                        stream.write(line + "\n")
                        stream.flush()  # what was answered is not asked again after a kill
                        bar.advance(task)

            if failed:
                answer(failed[begun:], again)
                lines = again.read_text(encoding="utf-8").split("\n")[:-1]
                replace_rows(out, dict(zip(failed, lines, strict=True)))
            again.unlink(missing_ok=True)
            answer(range(done, len(questions)), out)
    except OSError as error:
        raise explain_os_error(error, out) from error
    reasons = list(failed_rows(out).values())
    if reasons:
        raise ToolmemError(
            f"{len(reasons)} of {len(questions)} prompts have no answer ({reasons[0]}): their rows in "
            f"{out} say why; the same call asks them again"
        )


def row(run: Run, question: str, generated: Generated) -> dict[str, Any]:
    """What the output file says of one prompt."""
    reply = run.reply(generated)
    said = {
        "prompt": question,
        "answer": reply.answer,
        "dialogue": [{"role": role, "text": text} for role, text in reply.dialogue],
        "finish_reason": generated.finish_reason,
        "tool_calls": len(generated.tool_calls),
    }
    if generated.finish_reason == "error":
        said |= {"answer": None, "error": generated.error}
    return said


def main(command: str, argv: list[str]) -> int:
    """Entry."""
    call(
        generate,
        argv,
        prog=f"toolmem {command}",
        example='toolmem generate --checkpoint runs/first --prompt "When was Ann Smith born?"',
    )
    return 0
