"""Findings for people: on the terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from rich.console import Console
from rich.style import Style
from rich.text import Text

from tptrain.config.schema import DataSection
from tptrain.inspection.findings import Example, Filling, Findings, Lengths, Token

# Role -> colour on the terminal, background on the page.
_COLOURS = {
    "": ("bright_black", "#e6e6e6"),
    "system": ("magenta", "#eadcf8"),
    "user": ("cyan", "#d5ecf7"),
    "assistant": ("green", "#dcf2d5"),
    "tool": ("yellow", "#fbeec4"),
}
_LEGEND = {
    "": "nobody's (BOS, template)",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_VISIBLE = {"\n": "\u21b5\n", "\t": "\u21e5\t"}
_BAR = 40  # characters of the longest bar
_RECORD_CHARACTERS = 400  # of a dropped record that are shown


def summary_lines(found: Findings, section: DataSection) -> list[str]:
    """Everything but the tokens, as lines of text."""
    counts, lines = found.counts, [f"{found.counts}."]
    for reason, count in counts.dropped.items():
        lines.append(f"  dropped {count / counts.records:7.2%}  {reason}")
    lines.append(f"  truncated {counts.truncated / counts.records:.2%} (data.too_long={section.too_long})")
    if found.lengths is not None:
        lines += ["", *_length_lines(found.lengths, section.seq_len)]
    if found.fillings:
        lines += ["", f"Rows of data.seq_len={section.seq_len} tokens (data.packing={section.packing}):"]
        lines += [_filling_line(packing, filling) for packing, filling in found.fillings.items()]
    return [*lines, "", *_served_lines(found)]


def _length_lines(lengths: Lengths, seq_len: int) -> list[str]:
    head = (
        f"Tokens of a record: mean {lengths.mean:.0f}, median {lengths.median:,}, "
        f"95 % within {lengths.p95:,}, longest {lengths.longest:,}; data.seq_len={seq_len:,}"
    )
    most = max(lengths.records)
    bars = [
        f"  {begin + 1:>7,} to {end:>7,} {count:>9,}  {'█' * round(_BAR * count / most)}".rstrip()
        for begin, end, count in zip(lengths.edges[:-1], lengths.edges[1:], lengths.records, strict=True)
    ]
    return [head, *bars]


def _filling_line(packing: str, filling: Filling) -> str:
    return (
        f"  {packing:<9} {filling.rows:>9,} rows an epoch, {filling.density:7.2%} of their places filled, "
        f"{filling.records_per_row:.1f} records a row"
    )


def _served_lines(found: Findings) -> list[str]:
    served = found.served
    return [
        f"Served by vLLM ({served.endpoint}):",
        f"  prompt     {served.same_prompt:,} of {served.compared:,} questions are sent as the ids that were "
        "trained on",
        f"  begins     rows: {_counted(served.begins_with)}; sent: {_counted(served.sent_begins_with)}",
        f"  ends       rows: {_counted(served.ends_with)}",
        f"  stops at   {', '.join(f'{name} ({token})' for name, token in served.stops.items())}; "
        f"{served.unstopped:,} rows end with none of these",
    ]


def _counted(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{name!r} {count:,}" for name, count in tokens.items()) or "nothing"


def print_findings(found: Findings, section: DataSection, console: Console) -> None:
    """The summary, and the shown rows in colours: bold and underlined is what the loss counts."""
    for line in summary_lines(found, section):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    legend = Text("\nTokens: ")
    for role, name in _LEGEND.items():
        legend.append(name, Style(color=_COLOURS[role][0])).append("  ")
    console.print(legend.append("counted in the loss", Style(bold=True, underline=True)))
    for example in found.examples:
        console.print(f"\nRecord {example.number:,}, {_sizes(example.tokens)}:", highlight=False)
        console.print(_coloured(example.tokens), soft_wrap=True)
    for example in found.dropped:
        console.print(f"\nRecord {example.number:,} is dropped: {example.reason}", highlight=False)
        console.print(_record_text(example), markup=False, highlight=False, soft_wrap=True)


def _sizes(tokens: Sequence[Token]) -> str:
    return f"{len(tokens):,} tokens, {sum(token.counted for token in tokens):,} counted in the loss"


def _coloured(tokens: Iterable[Token]) -> Text:
    text = Text()
    for token in tokens:
        style = Style(color=_COLOURS[token.role][0], bold=token.counted, underline=token.counted)
        text.append(_shown(token.text), style)
    return text


def _shown(text: str) -> str:
    return "".join(_VISIBLE.get(character, character) for character in text)


def _record_text(example: Example) -> str:
    text = json.dumps(dict(example.record), ensure_ascii=False, default=str)
    return text if len(text) <= _RECORD_CHARACTERS else f"{text[:_RECORD_CHARACTERS]} ..."


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222
}} pre {{ font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre.row {{ border: 1px solid #ccc; border-radius: 4px; padding: .6em }}
.t {{ border-radius: 2px }} .t:hover {{ outline: 1px solid #333 }}
.c {{ font-weight: 700; border-bottom: 2px solid #c2410c }}
{roles}
</style></head><body>
<h1>{title}</h1>
<pre>{summary}</pre>
<h2>Rows</h2>
<p>{legend} <span class="t c">counted in the loss</span>. Hover over a token for its place, id and role.</p>
{rows}
</body></html>
"""


def html_page(found: Findings, section: DataSection, title: str) -> str:
    """The same as one page: no script, no style sheet, no picture from elsewhere."""
    classes = {role: f"r{index}" for index, role in enumerate(_COLOURS)}
    legend = " ".join(
        f'<span class="t {classes[role]}">{escape(name)}</span>' for role, name in _LEGEND.items()
    )
    rows = [
        f"<h3>Record {example.number:,}: {_sizes(example.tokens)}</h3>\n"
        f'<pre class="row">{_spans(example.tokens, classes)}</pre>'
        for example in found.examples
    ]
    rows += [
        f"<h3>Record {example.number:,} is dropped: {escape(example.reason)}</h3>\n"
        f'<pre class="row">{escape(_record_text(example))}</pre>'
        for example in found.dropped
    ]
    return _PAGE.format(
        title=escape(title),
        roles="\n".join(
            f".{classes[role]} {{ background: {colour} }}" for role, (_, colour) in _COLOURS.items()
        ),
        summary=escape("\n".join(summary_lines(found, section))),
        legend=legend,
        rows="\n".join(rows),
    )


def _spans(tokens: Sequence[Token], classes: Mapping[str, str]) -> str:
    spans = []
    for place, token in enumerate(tokens):
        kind = f"t {classes[token.role]}{' c' if token.counted else ''}"
        counted = "counted" if token.counted else "not counted"
        about = f"{place}: id {token.id}, {token.role or 'nobody'}, {counted}"
        spans.append(f'<span class="{kind}" title="{about}">{escape(_shown(token.text))}</span>')
    return "".join(spans)
