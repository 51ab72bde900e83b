// Browser side of the live view. Python sends all text, which is set as text and never as markup; Vega draws the curves from the
// charts and rows that Python sends.

/** Create an element with a class and attributes. */
function make(tag, name, attributes = {}) {
  const element = document.createElement(tag);
  element.className = name;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Set a text only if it differs, to keep the reader's selection. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Give `parent` one child per item, reusing existing ones. */
function each(parent, items, create, update) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, index) => {
    const child = parent.children[index] ?? parent.appendChild(create());
    update(child, item, index);
  });
}

/** Unpack and import Vega, once per page. */
function loadVega(packed) {
  const key = Symbol.for("searchr1_async.vega");
  globalThis[key] ??= (async () => {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const source = await new Response(stream).arrayBuffer();
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    try {
      return await import(/* webpackIgnore: true */ url);
    } finally {
      URL.revokeObjectURL(url);
    }
  })();
  globalThis[key].catch(() => delete globalThis[key]);
  return globalThis[key];
}

/** Chart colours, from the surrounding notebook. */
function theme(element) {
  const ink = getComputedStyle(element).color;
  const soft = getComputedStyle(element.querySelector(".sr1-line")).borderTopColor;
  const font = getComputedStyle(element).fontFamily;
  return {
    background: null,
    font,
    padding: { top: 8, right: 9, bottom: 2, left: 2 },
    view: { stroke: null },
    axis: { labelColor: ink, titleColor: ink, gridColor: soft, domainColor: soft, tickColor: soft, labelFontSize: 10, titleFontSize: 10 },
  };
}

/** One curve: heading, newest value and, once Vega is loaded, the chart. */
class Curve {
  constructor(curve) {
    this.curve = curve;
    this.name = curve.name;
    this.element = make("figure", "sr1-curve");
    const caption = this.element.appendChild(make("figcaption", "sr1-caption"));
    caption.appendChild(make("span", "sr1-heading")).textContent = curve.heading;
    this.value = caption.appendChild(make("span", "sr1-soft"));
    this.holder = this.element.appendChild(make("div", "sr1-chart"));
    this.hint = this.element.appendChild(make("div", "sr1-hint sr1-soft"));
    this.api = null;
  }

  async embed(vega, spec, config) {
    const old = this.api;
    const place = make("div", "sr1-fill", { role: "img", "aria-label": `${this.curve.heading} by optimiser step` });
    this.holder.replaceChildren(place);
    this.api = await vega.vegaEmbed(place, spec, { actions: false, renderer: "canvas", config, logLevel: 1 });
    old?.finalize();
  }

  feed(data) {
    if (!this.api) return;
    for (const [name, rows] of Object.entries(data)) {
      // A chart only has the datasets that it uses.
      if (name === "evaluations" && !this.curve.is_evaluated) continue;
      this.api.view.data(name, rows.map((row) => ({ ...row })));
    }
    this.api.view.runAsync();
  }

  resize() {
    if (!this.api || !this.holder.clientWidth) return;
    this.api.view.width(this.holder.clientWidth).runAsync();
  }

  describe(text, hasData, hasVega, problem) {
    say(this.value, text);
    say(this.hint, problem || (!hasVega ? "loading the chart" : hasData ? "" : "available after the first step"));
    this.holder.style.visibility = hasVega && hasData ? "visible" : "hidden";
  }

  close() {
    this.api?.finalize();
    this.api = null;
  }
}

/** A titled stacked bar with a legend. */
function makeStack() {
  const stack = make("div", "sr1-stack");
  stack.appendChild(make("div", "sr1-heading"));
  stack.appendChild(make("div", "sr1-parts", { "aria-hidden": "true" }));
  stack.appendChild(make("div", "sr1-legend"));
  return stack;
}

function updateStack(element, stack, place) {
  const [heading, parts, legend] = element.children;
  say(heading, stack.title);
  const colour = (index) => `sr1-part sr1-part-${place === 0 ? index : index + 4}`;
  each(parts, stack.parts, () => make("div", ""), (part, item, index) => {
    part.className = colour(index);
    part.style.width = `${(100 * item.count) / stack.whole}%`;
  });
  each(legend, stack.parts, makeKey, (key, item, index) => {
    key.firstElementChild.className = `sr1-dot ${colour(index)}`;
    say(key.lastElementChild, `${item.count.toLocaleString("en-US")} ${item.name}`);
  });
}

function makeKey() {
  const key = make("span", "sr1-key");
  key.appendChild(make("span", "sr1-dot"));
  key.appendChild(make("span", ""));
  return key;
}

function makeSection() {
  const section = make("div", "sr1-section");
  section.appendChild(make("div", "sr1-heading"));
  section.appendChild(make("dl", "sr1-pairs"));
  return section;
}

function makePair() {
  const pair = make("div", "sr1-pair");
  pair.appendChild(make("dt", "sr1-soft"));
  pair.appendChild(make("dd", ""));
  return pair;
}

function updateSection(element, section) {
  say(element.firstElementChild, section.title);
  each(element.lastElementChild, section.rows, makePair, (pair, [label, value]) => {
    say(pair.firstElementChild, label);
    say(pair.lastElementChild, value);
  });
}

function makeBar() {
  const bar = make("div", "sr1-phase");
  bar.appendChild(make("div", "sr1-soft"));
  const track = bar.appendChild(make("div", "sr1-track", { role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }));
  track.appendChild(make("div", "sr1-done"));
  return bar;
}

function updateBar(element, bar) {
  const [text, track] = element.children;
  say(text, `${bar.name}: ${bar.text}`);
  track.setAttribute("aria-valuenow", String(Math.round(100 * bar.share)));
  track.setAttribute("aria-label", bar.name);
  track.firstElementChild.style.width = `${100 * bar.share}%`;
}

/** Pause/resume and stop buttons. */
class Buttons {
  constructor(press) {
    this.element = make("div", "sr1-buttons");
    this.pause = this.add("Pause", "Pause the run: no new requests are sent", () => {
      press(this.isPaused ? "resume" : "pause");
      this.wait(this.isPaused ? "Resuming…" : "Pausing…");
    });
    this.stop = this.add("Stop", "Stop the run: finished steps are kept, resume=True continues from them", () => {
      press("stop");
      say(this.stop, "Stopping…");
      this.stop.disabled = true;
    });
    this.isPaused = false;
    this.asked = null;
  }

  add(text, label, action) {
    const button = this.element.appendChild(make("button", "sr1-button", { type: "button", "aria-label": label, title: label }));
    button.textContent = text;
    button.addEventListener("click", action);
    return button;
  }

  wait(text) {
    this.asked = { standing: this.standing, until: Date.now() + 5000 };
    say(this.pause, text);
    this.pause.disabled = true;
  }

  update(standing) {
    this.standing = standing;
    this.element.hidden = standing === "ended";
    if (this.asked && this.asked.standing === standing && Date.now() < this.asked.until) return;
    this.asked = null;
    this.isPaused = standing === "paused";
    say(this.pause, this.isPaused ? "Resume" : "Pause");
    const label = this.isPaused ? "Resume the run" : "Pause the run: no new requests are sent";
    this.pause.setAttribute("aria-label", label);
    this.pause.title = label;
    this.pause.disabled = standing === "starting";
  }
}

/** The view of one model in one place of the page. */
class View {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.charts = null;
    this.rows = [];
    this.evaluations = [];
    this.running = "";
    this.problem = "";
    this.build();
  }

  build() {
    const { root } = this;
    root.classList.add("sr1-view");
    const head = root.appendChild(make("div", "sr1-head"));
    const titles = head.appendChild(make("div", "sr1-titles"));
    this.title = titles.appendChild(make("span", "sr1-title"));
    this.badge = titles.appendChild(make("span", "sr1-badge"));
    this.buttons = new Buttons((press) => this.model.send({ press }));
    if (this.model.get("has_controls")) head.appendChild(this.buttons.element);
    const line = root.appendChild(make("div", "sr1-line"));
    this.progress = line.appendChild(make("span", "sr1-progress", { role: "status" }));
    this.status = line.appendChild(make("span", "sr1-soft"));
    this.bars = root.appendChild(make("div", "sr1-bars"));
    this.alerts = root.appendChild(make("div", "sr1-alerts", { "aria-live": "polite" }));
    this.curves = root.appendChild(make("div", "sr1-curves"));
    this.panels = this.model.get("curves").map((curve) => new Curve(curve));
    this.curves.append(...this.panels.map((panel) => panel.element));
    this.stacks = root.appendChild(make("div", "sr1-stacks"));
    this.sections = root.appendChild(make("div", "sr1-sections"));
  }

  draw() {
    const frame = this.model.get("frame");
    if (!frame || !frame.title) return;
    say(this.title, frame.title);
    say(this.badge, frame.badge);
    this.badge.className = `sr1-badge sr1-is-${frame.standing}`;
    say(this.progress, frame.progress);
    say(this.status, frame.status);
    this.buttons.update(frame.standing);
    each(this.bars, frame.bars, makeBar, updateBar);
    each(this.alerts, frame.alerts, () => make("div", ""), (element, alert) => {
      element.className = `sr1-alert sr1-alert-${alert.kind}`;
      say(element, alert.text);
    });
    each(this.stacks, frame.stacks, makeStack, updateStack);
    each(this.sections, frame.sections, makeSection, updateSection);
    this.drawCurves(frame);
  }

  drawCurves(frame) {
    this.curves.hidden = Object.keys(frame.curves).length === 0;
    const hasRunning = Object.keys(frame.running).length > 0;
    for (const panel of this.panels) {
      const known = (row) => row[panel.name] !== null && row[panel.name] !== undefined;
      const hasData = this.rows.some(known) || (hasRunning && known(frame.running));
      panel.describe(frame.curves[panel.name] ?? "", hasData, this.charts !== null, this.problem);
    }
    if (this.painted === undefined) return this.embed();
    const running = JSON.stringify(frame.running);
    if (running === this.running) return;
    this.running = running;
    for (const panel of this.panels) panel.feed({ running: hasRunning ? [frame.running] : [] });
  }

  async receive(message, buffers) {
    if (message.kind === "rows") {
      // The page missed earlier rows: request them all.
      if (message.first > this.rows.length) return this.model.send({ press: "hello" });
      this.rows.splice(message.first, this.rows.length, ...message.rows);
      this.evaluations = message.evaluations;
      this.feed();
      this.draw();
    } else if (message.kind === "charts") {
      try {
        this.vega = await loadVega(buffers[0]);
        this.charts = message.specs;
        await this.embed();
      } catch (error) {
        console.warn("searchr1_async: the curves cannot be drawn", error);
        this.problem = "no chart: this page cannot draw it";
        this.draw();
      }
    } else if (message.kind === "no charts") {
      this.problem = "no chart: see the kernel's log";
      this.draw();
    }
  }

  /** Draw the charts once there is data: without data Vega warns and draws axes without numbers. */
  async embed() {
    if (!this.charts || !this.root.isConnected || !this.hasData()) return;
    const config = theme(this.root);
    this.painted = JSON.stringify(config);
    const datasets = this.data();
    await Promise.all(
      this.panels.map((panel) => panel.embed(this.vega, structuredClone({ ...this.charts[panel.name], datasets }), config)),
    );
    this.feed();
    this.draw();
  }

  hasData() {
    const { steps, running } = this.data();
    return steps.length + running.length > 0;
  }

  data() {
    const frame = this.model.get("frame");
    const running = frame?.running && Object.keys(frame.running).length ? [frame.running] : [];
    return { steps: this.rows, evaluations: this.evaluations, running };
  }

  feed() {
    for (const panel of this.panels) panel.feed(this.data());
  }

  /** Redraw if the notebook's theme changed. */
  repaint() {
    if (this.painted !== undefined && this.root.isConnected && JSON.stringify(theme(this.root)) !== this.painted) this.embed();
  }

  close() {
    for (const panel of this.panels) panel.close();
  }
}

function render({ model, el }) {
  const view = new View(model, el.appendChild(make("div", "")));
  const draw = () => view.draw();
  const receive = (message, buffers) => view.receive(message, buffers);
  const repaint = () => requestAnimationFrame(() => view.repaint());
  model.on("change:frame", draw);
  model.on("msg:custom", receive);
  const sizes = new ResizeObserver(() => view.panels.forEach((panel) => panel.resize()));
  sizes.observe(view.curves);
  // JupyterLab sets its theme on the body, VS Code and Colab on the root.
  const themes = new MutationObserver(repaint);
  for (const element of [document.body, document.documentElement]) {
    themes.observe(element, { attributes: true, attributeFilter: ["class", "theme", "data-jp-theme-name", "data-vscode-theme-kind", "style"] });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", repaint);
  draw();
  // A page opened during the run missed earlier messages.
  model.send({ press: "hello" });
  return () => {
    model.off("change:frame", draw);
    model.off("msg:custom", receive);
    sizes.disconnect();
    themes.disconnect();
    dark.removeEventListener("change", repaint);
    view.close();
  };
}

export default { render };
