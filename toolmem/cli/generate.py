"""``toolmem generate``: ask a trained model, tools in the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.console import ROLE_STYLES, progress, stdout
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error
from toolmem.jsonl import completed_rows, read_prompts
from toolmem.models.kernel_choice import KernelChoice

if TYPE_CHECKING:
    from toolmem.generation import Sampler
    from toolmem.run import Run

ROLE_NAMES = {1: "user", 2: "assistant", 3: "database"}


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
    attention: KernelChoice = "auto",
    device: str = "cpu",
) -> None:
    """Ask a trained model one question, or a file of them; tools answer its queries.

    Args:
        checkpoint: a run's folder, or a .ckpt file.
        prompt: one question; the dialogue is streamed to the screen.
        prompts: a JSONL file of rows {"prompt": "..."}; needs --out.
        out: the JSONL file to write, one row a prompt, in order; goes on where it was killed.
        factbase: the DuckDB file that queries go to (default: facts.duckdb in the run's folder).
        allow_other_factbase: accept a factbase whose facts are not those of training.
        max_new_tokens: tokens that the model may write.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the samples; row i of a file uses seed + i.
        attention: what runs attention: sdpa (torch's own, and C of ours), flex (FlexAttention), flash
            (the package flash-attn, on CUDA), plain (the reference), or the one for the device (auto).
        device: where the model runs.
    """
    if (prompt is None) == (prompts is None):
        raise ToolmemError("give either --prompt TEXT or --prompts FILE.jsonl")
    if (prompts is None) != (out is None):
        raise ToolmemError("--prompts FILE.jsonl and --out FILE.jsonl go together")
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
    if prompt is not None:
        show_stream(run, prompt, sampler, max_new_tokens, seed)
    elif prompts is not None and out is not None:
        answer_file(run, Path(prompts), Path(out), sampler, max_new_tokens, seed)


def show_stream(run: Run, question: str, sampler: Sampler, max_new_tokens: int, seed: int) -> None:
    """Print a dialogue as it comes, roles coloured."""
    console = stdout()
    role_tokens = set(run.tokenizer.role_ids.values())
    shown: str | None = None

    def show(role: str, text: str) -> None:
        nonlocal shown
        if role != shown:
            console.print(("\n" if shown else "") + f"{role:>9}: ", style=ROLE_STYLES[role], end="")
            shown = role
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    show("user", question)
    pending: list[int] = []
    events = run.stream(question, sampler=sampler, max_new_tokens=max_new_tokens, seed=seed)
    for token, role in events:
        if token in role_tokens:
            pending = []
            continue
        pending.append(token)
        text = run.tokenizer.decode(pending)
        if not text.endswith("�"):  # a character's bytes may come one by one
            show(ROLE_NAMES[role], text)
            pending = []
    console.print()


def answer_file(
    run: Run, prompts: Path, out: Path, sampler: Sampler, max_new_tokens: int, seed: int
) -> None:
    """Answer every row of a JSONL file, in order, going on where an earlier call was killed."""
    if out.resolve() == prompts.resolve():
        raise ToolmemError(f"--out {out} is the file of prompts itself: name another")
    questions = read_prompts(prompts)
    done = completed_rows(out, questions)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as stream, progress() as bar:
            task = bar.add_task("generating", total=len(questions), completed=done)
            asked = questions[done:]
            answers = run.ask_each(
                asked, sampler=sampler, max_new_tokens=max_new_tokens, seed=seed + done
            )
            for question, generated in zip(asked, answers, strict=True):
                line = json.dumps(row(run, question, generated), ensure_ascii=False)
                stream.write(line + "\n")
                stream.flush()  # what was answered is not asked again after a kill
                bar.advance(task)
    except OSError as error:
        raise explain_os_error(error, out) from error


def row(run: Run, question: str, generated: Any) -> dict[str, Any]:
    """What the output file says of one prompt."""
    reply = run.reply(generated)
    return {
        "prompt": question,
        "answer": reply.answer,
        "dialogue": [{"role": role, "text": text} for role, text in reply.dialogue],
        "finish_reason": generated.finish_reason,
        "tool_calls": len(generated.tool_calls),
    }


def main(command: str, argv: list[str]) -> int:
    """Entry."""
    call(
        generate,
        argv,
        prog=f"toolmem {command}",
        example='toolmem generate --checkpoint runs/first --prompt "When was Ann Smith born?"',
    )
    return 0
