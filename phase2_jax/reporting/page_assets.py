"""Style and script of the report page; everything is inside the page, which needs no network."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; } h2 { border-top: 2px solid #0072b2; padding-top: .6rem; margin-top: 2.5rem; }
h3 { margin-top: 2rem; } nav a { margin-right: 1.2rem; } a { color: #0072b2; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #d0d0d0; text-align: right; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
img { max-width: 100%; height: auto; } figure { margin: 0; } figcaption { max-width: 60rem; color: #333; }
.missing { background: #fff4e0; border-left: 4px solid #e69f00; padding: .5rem .8rem; }
.tokens { font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.tokens span { padding: 2px 0; } .tokens .now { outline: 2px solid #d55e00; }
.tokens .recalled { outline: 3px solid #000; }
.details { min-height: 3.2em; background: #f4f4f4; padding: .5rem .8rem; }
.passage label { margin-right: 1.2rem; } .bar { display: inline-block; width: 8rem; height: .9rem; margin: 0 .4rem;
  vertical-align: middle; }
summary { cursor: pointer; font-size: 1.2rem; }
"""

SCRIPT = """
for (const view of document.querySelectorAll('.passage')) {
  const data = JSON.parse(view.querySelector('script').textContent);
  const colouring = view.querySelector('.colouring'), layerChoice = view.querySelector('.layer');
  const details = view.querySelector('.details'), scale = view.querySelector('.scale');
  const tokens = [...view.querySelectorAll('.tokens span')];
  const byPosition = new Map(tokens.map(span => [Number(span.dataset.t), span]));
  const rgb = shade => `rgb(${data.palette[shade]})`;
  function draw() {
    const chosen = data.colourings[colouring.value], shades = chosen.shades[layerChoice.value];
    for (const span of tokens) {
      const shade = shades[span.dataset.t];
      span.style.background = shade < 0 ? '#ddd' : rgb(shade);
      span.style.color = shade < 0 || shade > 34 ? '#000' : '#fff';
    }
    const stops = data.palette.map(colour => `rgb(${colour})`).join(',');
    scale.replaceChildren(`${chosen.unit}: ${chosen.ends[0]}`);
    const bar = document.createElement('span');
    bar.className = 'bar';
    bar.style.background = `linear-gradient(to right, ${stops})`;
    scale.append(bar, chosen.ends[1]);
  }
  function show(span) {
    for (const other of tokens) other.classList.remove('now', 'recalled');
    const t = Number(span.dataset.t), layer = layerChoice.value, back = data.source[layer][t];
    span.classList.add('now');
    let recalled = 'nothing earlier in this document';
    if (back > 0) {
      recalled = `“${data.context[layer][t]}”, ${back} token${back > 1 ? 's' : ''} back ` +
        `(${data.share[layer][t]} % of all it recalls)`;
      const source = byPosition.get(t - back);
      if (source) source.classList.add('recalled');
    }
    details.textContent = `Layer ${layer}, token “${span.textContent}”: Γ ${data.figures[0][layer][t]} ` +
      `(half-life ${data.half_lives[layer][t]} tokens), write strength η ${data.figures[1][layer][t]}, ` +
      `readout ‖Wᵀq‖ ${data.figures[2][layer][t]}, surprise ${data.surprise[t]} nats. Recalls most: ${recalled}.`;
  }
  colouring.addEventListener('change', draw);
  layerChoice.addEventListener('change', draw);
  view.querySelector('.tokens').addEventListener('mouseover', event => {
    const span = event.target.closest('span');
    if (span) show(span);
  });
  draw();
}
"""
