// Browser side of the live view. Python sends its parts as HTML, escaped by its template; Vega draws the curves from the chart and the
// rows that Python sends.

const DATASETS = ["steps", "evaluations", "running"];
const PARTS = ["head", "bars", "alerts", "stacks", "sections"];

/** Unpack and import Vega, once per page. */
function loadVega(packed) {
  const key = Symbol.for("searchr1_async.vega");
  globalThis[key] ??= (async () => {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const source = await new Response(stream).arrayBuffer();
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    return import(/* webpackIgnore: true */ url);
  })();
  return globalThis[key];
}

/** Text of the chart as in the surrounding notebook. */
function theme(element) {
  const { color, fontFamily } = getComputedStyle(element);
  const axis = { labelColor: color, titleColor: color };
  return { background: null, font: fontFamily, padding: 4, view: { stroke: null }, axis, title: { color, subtitleColor: color } };
}

function render({ model, el }) {
  const root = el.appendChild(document.createElement("div"));
  root.className = "sr1-view";
  const places = {};
  for (const name of ["head", "bars", "alerts", "chart", "stacks", "sections"]) {
    places[name] = root.appendChild(document.createElement("div"));
    places[name].className = `sr1-${name}`;
  }
  places.alerts.setAttribute("aria-live", "polite");
  let chart = null; // of Vega
  let painted = ""; // its colours

  const draw = (name) => (places[name].innerHTML = model.get(name)); // only one that changed: the others keep the reader's selection
  const rows = (name) => structuredClone(model.get(name));
  const feed = (...names) => {
    if (!chart) return embed();
    for (const name of names) chart.view.data(name, rows(name));
    chart.view.runAsync();
  };
  /** Draw the chart once there are data: without any, Vega draws axes without numbers. */
  const embed = async () => {
    const datasets = Object.fromEntries(DATASETS.map((name) => [name, rows(name)]));
    const colours = theme(root);
    if (!model.get("vega")?.byteLength || !root.isConnected || datasets.steps.length + datasets.running.length === 0) return;
    if (painted === JSON.stringify(colours)) return;
    painted = JSON.stringify(colours);
    try {
      const { vegaEmbed } = await loadVega(model.get("vega"));
      const place = document.createElement("div");
      const spec = { ...structuredClone(model.get("spec")), datasets };
      const old = chart;
      chart = await vegaEmbed(place, spec, { actions: false, renderer: "canvas", config: colours, logLevel: 1 });
      places.chart.replaceChildren(place);
      old?.finalize();
      feed(...DATASETS);
    } catch (error) {
      console.warn("searchr1_async: the curves cannot be drawn", error);
      places.chart.textContent = "no curves: this page cannot draw them";
    }
  };
  const repaint = () => requestAnimationFrame(embed);
  const listeners = [
    ...PARTS.map((name) => ["change:" + name, () => draw(name)]),
    ...DATASETS.map((name) => ["change:" + name, () => feed(name)]),
    ["change:vega", embed],
  ];
  listeners.forEach(([event, act]) => model.on(event, act));
  // JupyterLab sets its theme on the body, VS Code and Colab on the root.
  const themes = new MutationObserver(repaint);
  for (const element of [document.body, document.documentElement]) {
    themes.observe(element, { attributes: true, attributeFilter: ["class", "theme", "data-jp-theme-name", "data-vscode-theme-kind", "style"] });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", repaint);
  PARTS.forEach(draw);
  repaint();
  return () => {
    listeners.forEach(([event, act]) => model.off(event, act));
    themes.disconnect();
    dark.removeEventListener("change", repaint);
    chart?.finalize();
  };
}

export default { render };
