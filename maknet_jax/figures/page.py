"""One HTML page that works offline, on a phone too: pictures, styles and script are inside it."""

import html

from maknet_jax import console

STYLE = """
:root{color-scheme:light;--mix:.8}*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:0 .8rem 3rem;background:#fff;color:#1a1a1a;
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:1rem 0 .3rem}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font:600 .95rem/1.3 ui-monospace,monospace;margin:0 0 .5rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:48rem}.note{color:#555;font-size:.9rem}
.bar{position:sticky;top:0;z-index:2;background:#fffffff2;border-bottom:1px solid #ccc;
padding:.5rem 0;display:flex;flex-wrap:wrap;gap:.4rem 1.5rem;align-items:center;font-size:.85rem}
.bar label{display:flex;gap:.5rem;align-items:center}.bar input{width:9rem;height:1.6rem}
.scale i{display:inline-block;width:9rem;height:.8rem;vertical-align:-.1rem;margin:0 .4rem;
background:linear-gradient(90deg,rgb(0,140,255),#777 50%,rgb(255,120,0))}
.card{border:1px solid #d5d5d5;border-radius:.5rem;padding:.8rem;margin:1rem 0}
.row{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fit,minmax(min(15rem,100%),1fr))}
.grid{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fill,minmax(min(11rem,46%),1fr))}
figure{margin:0;min-width:0}figcaption{font-size:.85rem;font-weight:600;margin-bottom:.25rem;
overflow-wrap:anywhere}figcaption small{font-weight:400;color:#555;display:block}
.stack{position:relative;background:#000;aspect-ratio:1;max-width:26rem}
.stack img{position:absolute;inset:0;width:100%;height:100%;image-rendering:auto}
.stack img.map{opacity:var(--mix)}
ol{list-style:none;margin:.3rem 0 0;padding:0;max-width:26rem}
li>*{display:grid;grid-template-columns:1.1rem 1fr auto;gap:.3rem;width:100%;padding:.22rem .3rem;
font:inherit;font-size:.88rem;line-height:1.25;text-align:left;border:0;border-radius:.25rem;
background:linear-gradient(90deg,#0000000f var(--p),transparent var(--p));color:inherit}
li>button{cursor:pointer;min-height:2rem;align-items:center}
li>button[aria-pressed=true]{outline:2px solid #888}
.true{color:#0a7a28}.false{color:#c4161c}.unknown{color:#000}
.gone{text-decoration:line-through;opacity:.75}.new{font-style:italic}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img.chart{width:100%;max-width:60rem;height:auto}
"""
SCRIPT = """
const mix=document.getElementById('mix');
if(mix)mix.oninput=()=>document.documentElement.style.setProperty('--mix',mix.value/100);
document.querySelectorAll('button[data-map]').forEach(button=>button.onclick=()=>{
const figure=button.closest('figure');figure.querySelector('.map').src=button.dataset.map;
figure.querySelectorAll('button').forEach(b=>b.setAttribute('aria-pressed',b===button))});
"""
MARKS = {"true": "✓", "false": "✗", "unknown": "·"}
KEY = (
    '<span class="true">✓ annotated</span> <span class="false">✗ annotated as absent</span> '
    '<span class="unknown">· annotation missing</span>'
)
SLIDER = (
    '<div class="bar"><label>CT <input id="mix" type="range" min="0" max="100" value="80" '
    'aria-label="opacity of the map"> map</label><span class="scale">lowers<i></i>raises</span>'
    f"<span>{KEY}</span></div>"
)


def document(title, lead, parts):
    """The page as text: `lead` and `parts` are HTML, the title is not."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n{lead}\n{''.join(parts)}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def paragraph(text, kind="note"):
    """A paragraph of plain text."""
    return f'<p class="{kind}">{html.escape(text)}</p>\n'


def table(header, rows):
    """A table of plain text that scrolls by itself where it is too wide."""
    lines = []
    for cell, line in [("th", header), *(("td", row) for row in rows)]:
        cells = "".join(f"<{cell}>{html.escape(str(value))}</{cell}>" for value in line)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>\n'


def attribution_lead(about, shown):
    """What stands above the cards of `maknet attribute`."""
    text = (
        f"Integrated Gradients of the {about['output']}: {about['steps']} steps (doubled up to "
        f"{about['refine']} times where a map is not complete), {about['method']}, from the "
        f"baseline {about['baseline']}. Tap a label to see its map; full colour is the 99.5th "
        "percentile of each map, smoothed by a pixel for the eye."
    )
    complete = "; ".join(
        f"{name}: {share:.1%} of maps complete to 1 %, {about['flagged'][name]} flagged with a !"
        for name, share in about["complete"].items()
    )
    lead = paragraph(text) + paragraph(f"{shown} of {about['images']} images shown. {complete}.")
    if rows := [
        [name, *(console.format_interval(values, 2) for values in areas.values())]
        for name, areas in about.get("faithfulness", {}).items()
    ]:
        header = ["network", *next(iter(about["faithfulness"].values()))]
        text = (
            "Mean confidence in the first label while pixels are deleted or inserted (95 % by "
            f"resampling the {about['groups']} patients or series; of one alone there is no "
            "interval). A map that knows more than chance deletes below and inserts above random "
            "pixels. Of two networks both are asked for the first label of the first."
        )
        lead += paragraph(text) + table(header, rows)
        rows = [
            [name, console.format_interval(values, 2)]
            for name, values in about["differences"].items()
        ]
        lead += table(["on the same images", "difference"], rows)
    return lead + SLIDER


def attribution_card(title, ct, models):
    """An image, and for each network its map and its labels (Figure 3).

    Args:
      title: the image's id.
      ct: URI of the picture.
      models: dicts of name, labels (label, truth, confidence, map, flagged), missed ([label,
        confidence]) and uris, one a map.
    """
    parts = [f"<figure><figcaption>CT</figcaption>{_stack(ct)}</figure>"]
    for model in models:
        lines = []
        for entry in model["labels"]:
            text = entry["label"] + (" !" if entry.get("flagged") else "")
            line = _line(text, entry["truth"], entry["confidence"])
            if entry["map"] is None:
                lines.append(f"<li>{line('div')}</li>")
            else:
                pressed = "true" if entry["map"] == 0 else "false"
                uri = model["uris"][entry["map"]]
                data = f'data-map="{uri}" aria-pressed="{pressed}"'
                lines.append(f"<li>{line('button', data)}</li>")
        missed = ", ".join(f"{name} {score:.2f}" for name, score in model["missed"])
        below = paragraph(f"annotated, not among the first: {missed}") if missed else ""
        parts.append(
            f"<figure><figcaption>{html.escape(model['name'])}</figcaption>"
            f"{_stack(ct, model['uris'][0])}<ol>{''.join(lines)}</ol>{below}</figure>"
        )
    return (
        f'<section class="card"><h3>{html.escape(title)}</h3><div class="row">{"".join(parts)}'
        "</div></section>\n"
    )


def perturbation_card(title, models):
    """For each network a row of an image's perturbed forms with their labels (Figure 4).

    Args:
      title: the image's id.
      models: dicts of name and columns, each a dict of title, uri and labels (label, truth,
        confidence, state): state is "gone" for one of the original's first labels that is no
        longer among them, "new" for one that came in, else "".
    """
    parts = []
    for model in models:
        figures = []
        for column in model["columns"]:
            lines = [
                f"<li>{_line(e['label'], e['truth'], e['confidence'])('div', '', e['state'])}</li>"
                for e in column["labels"]
            ]
            figures.append(
                f"<figure><figcaption>{html.escape(column['title'])}</figcaption>"
                f"{_stack(column['uri'])}<ol>{''.join(lines)}</ol></figure>"
            )
        parts.append(
            f'<p><b>{html.escape(model["name"])}</b></p><div class="grid">{"".join(figures)}</div>'
        )
    return f'<section class="card"><h3>{html.escape(title)}</h3>{"".join(parts)}</section>\n'


def _line(label, truth, confidence):
    def line(tag, data="", state=""):
        return (
            f'<{tag} class="{truth}" style="--p:{100 * confidence:.0f}%" {data}>'
            f'<span>{MARKS[truth]}</span><span class="{state}">{html.escape(label)}</span>'
            f"<span>{confidence:.2f}</span></{tag}>"
        )

    return line


def _stack(ct, overlay=None):
    above = f'<img class="map" src="{overlay}" alt="map">' if overlay else ""
    return f'<div class="stack"><img src="{ct}" alt="CT slice">{above}</div>'
