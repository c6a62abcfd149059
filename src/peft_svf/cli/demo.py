# SPDX-License-Identifier: Apache-2.0
"""
`demo`: a base model and experts, or a bundle -> a page in the browser that shows them at work. Needs Gradio.

A request is answered twice in one batch, by the base and under the mixture that the first pass or the visitor chose.
The page opens no paths: what it receives is text and numbers, and its experts are those of the command line.
"""

import gzip
import json
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import extra
from . import options
from .console import check_address, shares
from .options import option
from .sources import load_experts

if TYPE_CHECKING:
    import gradio as gr

    from ..experts.expert import Mixture
    from ..rows import Prompt
    from ..two_pass import Transformer2Model

EXAMPLES = Path(__file__).parents[3] / "examples"  # is there if the package is installed from a clone
ROUTED, MIXED = "the first pass", "my mixture"
SHOTS = 5
SEARCH: Any = {"population": 8, "iterations": 8, "max_seconds": 120.0}  # SmolLM2-135M takes a minute of two CPU cores
Turn = tuple[str, str, str, str]  # a question, the base's answer, the experts' answer, and which experts these are


def demo(
    model: Annotated[str | None, typer.Argument(help="Base model or bundle: folder or Hub repository.")] = None,
    experts: options.Experts = [],  # noqa: B006
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    host: options.Host = "127.0.0.1",
    port: options.Port = 7860,
    new_tokens: Annotated[int, option("Length of an answer.", min=1)] = 128,
) -> None:
    """
    Show experts at work in the browser: their answers beside the base's, who gave them and why.

    In a clone of the repository, without arguments, it takes SmolLM2-135M-Instruct and the experts of examples/.
    """
    with extra("demo", "The page needs more packages"):
        import gradio
    check_address(host, port)
    requests: dict[str, list[dict[str, str]]] = {}
    if not experts and model is None:
        if not (EXAMPLES / "smollm2.py").is_file():
            raise typer.BadParameter("Name a base model with --experts, or a bundle.")
        print(
            "Takes SmolLM2-135M-Instruct (the first time 92 MB to download) and its experts in examples/.", flush=True
        )
        model = str(runpy.run_path(str(EXAMPLES / "smollm2.py"))["smollm2_folder"]())
        folders = sorted((EXAMPLES / "experts").iterdir())
        experts, dtype, requests = [*map(str, folders)], "float32", {f.name: _requests(f.name) for f in folders}
    page = build(load_experts(experts, model, revision, dtype), requests, new_tokens)
    print(f"Open http://{host}:{port} in a browser; Ctrl-C ends it.", flush=True)
    font = gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # Gradio's 600 has no Latin
    theme = gradio.themes.Default(font=[font, "sans-serif"])
    settings: Any = {"share": False, "quiet": True, "show_error": True, "footer_links": [], "max_file_size": "1mb"}
    page.launch(server_name=host, server_port=port, theme=theme, **settings)


def _requests(name: str) -> list[dict[str, str]]:
    """Read solved requests, none of them of training, for an expert of examples/."""
    with gzip.open(EXAMPLES / "data" / "requests" / name / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(SHOTS), strict=False)]


def build(
    model: "Transformer2Model", requests: Mapping[str, Sequence[Mapping[str, str]]] = {}, new_tokens: int = 128
) -> "gr.Blocks":
    """
    Make the page.

    Args:
        model ([`Transformer2Model`]): Base and experts.
        requests (`Mapping[str, Sequence[Mapping]]`): Solved requests to try, `{"prompt", "answer"}`, by expert.
        new_tokens (`int`): Length of an answer.
    """
    import gradio as gr

    descriptions = model.library.descriptions
    base = Path(model.library.model.get_base_model().name_or_path).name

    with gr.Blocks(title=f"Experts of {base}", analytics_enabled=False, delete_cache=(600, 600)) as page:
        listed = ", ".join(f"**{name}** ({text})" if text else f"**{name}**" for name, text in descriptions.items())
        gr.Markdown(f"# {base} and its experts\n{listed}")
        turns = gr.State([])
        with gr.Row():
            left = gr.Chatbot(label="Base", height=340, min_width=320, buttons=[])
            right = gr.Chatbot(label="With experts", height=340, min_width=320, buttons=[])
        question = gr.Textbox(show_label=False, placeholder="Ask something", submit_btn=True, stop_btn=True)
        if requests:
            gr.Examples([rows[0]["prompt"] for rows in requests.values()], question, label="For example")
        with gr.Row():
            with gr.Column():
                bars = gr.Label(label="Whose request is it?", show_heading=False)
                why = gr.Markdown("After an answer: which experts gave it, why, and what they moved.")
            drawing = gr.Plot(show_label=False)
            with gr.Column():
                way = gr.Radio([ROUTED, MIXED], value=ROUTED, label="The mixture is chosen by")
                sliders = [gr.Slider(0, 1, 0, step=0.05, label=name) for name in descriptions]
                sees = gr.Checkbox(label="Answers see the turns above")
        with gr.Accordion("Find a mixture from a few solved examples", open=False):
            table = gr.Dataframe(
                headers=["request", "answer"],
                type="array",
                row_count=SHOTS,
                column_widths=["75%", "25%"],
                render=False,
            )
            with gr.Row():
                for name, rows in requests.items():
                    cells = [[row["prompt"], row["answer"]] for row in rows]
                    gr.Button(f"Fill in {name}", size="sm").click(lambda cells=cells: cells, outputs=table)
                upload = gr.UploadButton("Upload JSON lines", type="binary", file_types=[".jsonl"], size="sm")
            table.render()
            start = gr.Button("Find a mixture", variant="primary")
            course = gr.Markdown()
        chat = [turns, left, right]
        inputs, outputs = [question, turns, sees, way, *sliders], [question, *chat, bars, why, drawing]
        asking = question.submit(partial(ask, model, new_tokens), inputs, outputs, api_name="ask")
        question.stop(None, cancels=[asking])
        gr.on([left.clear, right.clear], lambda: ([], [], []), outputs=chat, cancels=[asking])
        for slider in sliders:
            slider.input(None, outputs=way, js=f"() => '{MIXED}'")
        upload.upload(cells_of, upload, table)
        start.click(partial(adapt, model), table, [course, way, *sliders], api_name="adapt")
    return page


def ask(
    model: "Transformer2Model",
    new_tokens: int,
    question: str,
    turns: Sequence[Turn],
    sees: bool,
    way: str,
    *weights: float,
) -> Iterator[tuple[Any, ...]]:
    """Answer a question; yield the new values of its outputs after every token."""
    import gradio as gr

    if not question.strip():
        raise gr.Error("Write a request first.", print_exception=False)
    chats = [[*_chat(turns if sees else [], side), *_user(question)] for side in (1, 2)]
    chosen = dict(zip(model.library.names, weights, strict=True)) if way == MIXED else None
    (mixture,) = model.first_pass(chats[1:], mixture=chosen)
    panel = shares_of(mixture), reasons(model, chats[1], mixture), None
    for left, right in answers(model, chats, mixture, new_tokens):
        now = [*turns, (question, left, right, named(mixture.alpha))]
        yield "", now, _chat(now, 1), _chat(now, 2, signed=True), *panel
        panel = (gr.skip(),) * 3
    yield (gr.skip(),) * 6 + (picture(model, mixture, chats[1], right),)


def adapt(model: "Transformer2Model", table: Sequence[Sequence[str]]) -> Iterator[tuple[Any, ...]]:
    """Search the mixture that answers rows of request and answer; yield a text, that it is used, and its weights."""
    import gradio as gr

    cells = [[str(cell or "").strip() for cell in row] for row in table]
    rows = [{"prompt": _user(text), "answer": answer} for text, answer in cells if text and answer]
    if not rows:
        raise gr.Error("Give at least one request with its answer.", print_exception=False)
    for alpha, text in searched(model, rows):
        yield text, MIXED, *(alpha.get(name, 0.0) for name in model.library.names)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _chat(turns: Sequence[Turn], side: int, signed: bool = False) -> list[dict[str, str]]:
    """Return the chat with the base (1) or with the experts (2), for people with their names."""
    chat = []
    for turn in turns:
        chat += [*_user(turn[0]), {"role": "assistant", "content": turn[side] + f"\n\n*{turn[3]}*" * signed}]
    return chat


def cells_of(content: bytes) -> list[list[str]]:
    """Read JSON lines of `{"prompt", "answer"}` into the cells of a table. Raises `ValueError` for anything else."""
    try:
        rows = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        return [[row["prompt"] + "", row["answer"] + ""] for row in rows]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'Lines like {{"prompt": "2 + 2?", "answer": "4"}} are expected ({error!r}).') from error


def named(alpha: Mapping[str, float]) -> str:
    """Name who answers: the base, an expert, or the terms of a mixture."""
    terms = [name if weight == 1 else f"{weight:.2f} {name}" for name, weight in _shown(shares(alpha)).items()]
    return " + ".join(term for term in terms if not term.startswith(("0.00 ", "-0.00 ")))


def shares_of(mixture: "Mixture") -> dict[str, float]:
    """Return what the bars show: the probabilities of a first pass, else weights and what they leave to the base."""
    return _shown(shares(mixture.alpha) if mixture.strategy == "explicit" else mixture.probabilities)


def _shown(values: Mapping[str, float]) -> dict[str, float]:
    """Call the base by that name, last."""
    return {name: value for name, value in values.items() if name != "other"} | {"base": values["other"]}


def reasons(model: "Transformer2Model", chat: "Prompt", mixture: "Mixture") -> str:
    """Write in Markdown who answers and why; with routing keys also how far the request is from each kind."""
    from ..adaptation.router import router_of
    from ..experts.expert import Mixture
    from ..experts.key import key_ids, read_states

    if mixture.strategy == "explicit":
        return f"**{named(mixture.alpha)}**, as you chose."
    text = f"**{named(mixture.alpha)}**. First pass: {mixture.strategy}, confidence {mixture.confidence:.2f}."
    if mixture.strategy != "key":
        return text
    router = router_of(model.library, model.reader)
    with model.library.activate(Mixture()) as base:
        states = read_states(base, key_ids(model.reader, [chat]), *router.how)
    apart = (router.distances(states)[0] / router.far).sqrt().tolist()
    kinds = [*model.library.names, "everyday requests"]
    nearest = ", ".join(f"{name} {distance:.2f}" for distance, name in sorted(zip(apart, kinds, strict=True)))
    return f"{text}\n\nDistance from the requests of each: {nearest}. If no expert is within 1, the base answers."


def picture(model: "Transformer2Model", mixture: "Mixture", chat: "Prompt", answer: str) -> Any:
    """Draw what each block of a mixture does to an answer; `None` for the base, or without an answer."""
    from ..adaptation.judge import block_effects
    from .plots import draw_effects, new_figure

    if not (mixture.alpha and answer.strip()):
        return None
    effects = block_effects(model.library, model.tokenizer, mixture, [{"prompt": chat, "answer": answer}])
    figure, (axes,) = new_figure(1, width=6)
    draw_effects(axes, effects, named(mixture.alpha))
    return figure


def answers(
    model: "Transformer2Model", chats: Sequence["Prompt"], mixture: "Mixture", new_tokens: int
) -> Iterator[list[str]]:
    """Answer two chats in one batch, the first by the base; yield both texts after every token."""
    from ..experts.expert import Mixture
    from ..rows import encode

    inputs = encode(model.reader, chats).to(model.device)

    def generate(emit: Callable[[Any], None]) -> None:
        streamer = SimpleNamespace(put=emit, end=lambda: None)  # transformers' own takes one row
        model.answer([Mixture(), mixture], **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=streamer)

    tokens: list[list[int]] = [[], []]
    steps = emitted(generate)
    next(steps)  # the prompts
    for step in steps:  # (2,)
        for row, token in zip(tokens, step.tolist(), strict=True):
            row.append(token)
        yield [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def searched(model: "Transformer2Model", rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, float], str]]:
    """Search the mixture that answers rows best; yield its weights and a text, first the best so far."""
    from ..adaptation import Search

    best: tuple[tuple[float, ...], list[float]] = ((-float("inf"),), [])
    count = 0

    def search(emit: Callable[[Any], None]) -> None:
        def score(judge: Callable[[Any], Any], vectors: Any) -> Any:
            nonlocal best, count
            judged = judge(vectors)
            best = max(best, *zip(judged.scores, vectors.tolist(), strict=True))
            count += len(vectors)
            alpha = dict(zip(model.library.names, best[1], strict=True))
            emit((alpha, f"**{named(alpha)}** is the best of {count}: log-likelihood {best[0][-1]:.3f}"))
            return judged

        mixture = model.adapt(rows, search=Search(**SEARCH), evaluator=score)
        check, text = mixture.provenance["held_out"], f"**{named(mixture.alpha)}**."
        if check["examples"]:
            scores = {"what was found": check["found"], **_shown(check["rivals"])}
            text += " Log-likelihood on examples left out in turn: "
            text += ", ".join(f"{name} {score[-1]:.3f}" for name, score in scores.items())
        emit((mixture.alpha, text))

    yield from emitted(search)


def emitted(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Run `work(emit)` in a thread and yield what it emits; if the reader leaves, the next `emit` ends the work."""
    queue: SimpleQueue[Any] = SimpleQueue()
    left, end = Event(), object()

    def emit(value: Any) -> None:
        if left.is_set():
            raise InterruptedError("nobody reads this any more")
        queue.put(value)

    def run() -> None:
        try:
            work(emit)
        finally:
            queue.put(end)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run)
        try:
            while (value := queue.get()) is not end:
                yield value
        finally:
            left.set()
        done.result()
