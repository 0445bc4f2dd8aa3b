"""`convsched explain`: why a layer's kernel is as it is, or how it came to be, stage by stage."""

from __future__ import annotations

import click

from convsched.options import ACCURACIES, MAX_THREADS, Accuracy
from convsched.problem.layout import LAYOUTS, Layout


@click.command()
@click.argument("layer")
@click.option("--trace", "traced", is_flag=True, help="Every stage of the compilation, with the nest after it.")
@click.option("--algorithm", help="This one, such as direct or winograd(4,3).")
@click.option("--schedule", help="The steps, as text.")
@click.option("--threads", type=click.IntRange(min=1, max=MAX_THREADS), default=1, show_default=True)
@click.option("--layout", type=click.Choice([*LAYOUTS]), default="nchw", show_default=True)
@click.option("--accuracy", type=click.Choice(ACCURACIES), default="normal", show_default=True)
def explain(layer: str, traced: bool, algorithm: str | None, schedule: str | None, threads: int, layout: Layout,
            accuracy: Accuracy) -> None:
    """Print how LAYER is computed; LAYER is a problem's one-line text.

    For example: convsched explain "conv2d c=16 m=32 k=3x3 in=14x14 pad=1,1,1,1 bias act=relu"
    """
    from convsched.api import compile
    from convsched.explain.trace import trace
    from convsched.problem.parse import parse_problem

    kernel = compile(parse_problem(layer), algorithm=algorithm, schedule=schedule, threads=threads, layout=layout,
                     accuracy=accuracy)
    if not traced:
        click.echo(kernel.explain())
        return
    for stage in trace(kernel.plan):
        click.echo(f"{stage}\n")
