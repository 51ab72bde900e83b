// The page: filters, list, the open episode and the one to compare with.

const MAX_OTHERS = 200;
const MAX_ROWS = 300; // listed at once
const KEPT_CHUNKS = 8;

// The state; the URL's hash holds what differs from it.
const DEFAULTS = { find: "", only: "", suite: "", from: "", by: "order", down: "", episode: "", with: "" };
const SORTS = {
  order: ["rollout order", (row) => row.number],
  reward: ["reward", (row) => row.reward],
  advantage: ["size of advantage", (row) => (row.advantage === null ? null : Math.abs(row.advantage))],
  turns: ["turns", (row) => row.turns],
  tokens: ["tokens", (row) => row.tokens],
  seconds: ["seconds", (row) => row.seconds],
};

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

async function unpack(name) {
  const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const chunks = new Map(); // number -> promise; least recently used first

async function openEpisode(index, number) {
  const chunk = Math.floor(number / index.chunk);
  const found = chunks.get(chunk) || unpack("chunk-" + chunk);
  chunks.delete(chunk);
  chunks.set(chunk, found);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
  return (await found)[number % index.chunk];
}

// The matching rows in order, and for each flag how many of them have it.
function select(index, state) {
  const only = state.only.split(",").filter(Boolean);
  const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
  const found = index.rows.filter((row) =>
    (!state.suite || row.suite === state.suite) && (!state.from || row.source === state.from) &&
    only.every((name) => row.flags.includes(name)) && words.every((word) => row.words.includes(word)));
  const value = SORTS[state.by][1];
  const key = (row) => (value(row) === null ? Infinity : state.down ? -value(row) : value(row)); // without a value: last
  found.sort((a, b) => key(a) - key(b) || a.number - b.number);
  const counts = Object.fromEntries(Object.keys(index.flags).map((name) => [name, found.filter((row) => row.flags.includes(name)).length]));
  return { found, counts };
}

// Hashes are untrusted: invalid parts are ignored. Links of a report name an episode by evaluation, suite, question and sample.
function fromHash(index) {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) state[name] = (given[name] ?? state[name]).slice(0, 1000);
  if (!Object.hasOwn(SORTS, state.by)) state.by = "order";
  state.only = state.only.split(",").filter((name) => Object.hasOwn(index.flags, name)).join(",");
  if (!index.rows.some((row) => row.suite === state.suite)) state.suite = "";
  if (!index.rows.some((row) => row.source === state.from)) state.from = "";
  const named = (label, sample) => String(index.rows.find((row) => row.label?.toWellFormed() === label && String(row.member ?? 0) === (sample || "0") &&
    row.suite.toWellFormed() === given.in && row.id.toWellFormed() === given.question)?.number ?? "missing");
  if (given.question !== undefined) state.episode = named(given.system, given.sample);
  if (given.beside !== undefined) state.with = named(given.beside, given["beside-sample"]);
  if (!rowOf(index, state.episode)) state.episode = state.episode ? "missing" : "";
  if (!rowOf(index, state.with) || rowOf(index, state.with).asked !== rowOf(index, state.episode)?.asked) state.with = "";
  return state;
}

function rowOf(index, number) {
  return /^\d{1,9}$/.test(number) ? index.rows[Number(number)] : undefined;
}

function button(css, text, onClick) {
  const made = element("button", css, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function picker(css, label, options, onChange) {
  const made = element("select", css, ...options.map(([value, text]) => {
    const option = element("option", "", visibleText(text).slice(0, 80));
    option.value = value;
    return option;
  }));
  made.setAttribute("aria-label", label);
  made.addEventListener("change", () => onChange(made.value));
  return made;
}

class Page {
  constructor(index) {
    this.index = index;
    this.opening = 0;
    this.detail = element("main", "detail");
    this.list = element("div", "list");
    this.list.tabIndex = 0;
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", "Episodes");
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.ask({ episode: row.dataset.number, with: "" });
    });
    this.empty = element("div", "empty", "No matching episodes. ",
      button("", "Show all", () => this.ask({ ...DEFAULTS, episode: this.state.episode, with: this.state.with })));
    const notes = element("p", "notes", index.notes.join(" "), " Keys: ↑ ↓ to move, / to search.");
    const theme = button("theme", "◐", () => {
      const { style } = document.documentElement;
      const now = style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      style.colorScheme = now === "dark" ? "light" : "dark";
    });
    theme.setAttribute("aria-label", "light or dark");
    document.body.append(element("header", "top", element("h1", "", isolated("bdi", "", index.title)), notes, theme),
      element("nav", "side", this.makeControls(), this.empty, this.list), this.detail);
    document.body.classList.toggle("is-single", index.rows.length === 1);
    document.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("hashchange", () => this.set(fromHash(index)));
    this.set(fromHash(index));
    if (!this.state.episode && this.result.found.length) this.set({ ...this.state, episode: String(this.result.found[0].number) });
  }

  makeControls() {
    const { flags, rows } = this.index;
    const different = (name, all) => [["", all], ...[...new Set(rows.map((row) => row[name]))].map((value) => [value, value])];
    this.find = element("input", "find");
    this.find.type = "search";
    this.find.placeholder = "Search questions and answers";
    this.find.setAttribute("aria-label", this.find.placeholder);
    this.find.addEventListener("input", () => this.ask({ find: this.find.value }));
    this.flags = Object.entries(flags).map(([name, words]) => {
      const made = button("flag", words + " ", () => this.toggle(name));
      made.append(element("span", "count"));
      return [name, made];
    });
    this.suite = picker("suite", "Suite", different("suite", "all suites"), (suite) => this.ask({ suite }));
    this.from = picker("from", "Step or evaluation", different("source", "steps and evaluations"), (from) => this.ask({ from }));
    const sorts = Object.entries(SORTS).map(([name, [words]]) => [name, "by " + words]);
    this.by = picker("by", "Sort by", sorts, (by) => this.ask({ by, down: by === "order" ? "" : "1" })); // largest first
    this.down = button("down", "", () => this.ask({ down: this.state.down ? "" : "1" }));
    this.down.setAttribute("aria-label", "ascending or descending");
    this.count = element("div", "total");
    this.count.setAttribute("aria-live", "polite");
    return element("div", "controls", this.find, element("div", "flags", ...this.flags.map(([, made]) => made)),
      element("div", "pickers", this.suite, this.from), element("div", "pickers", this.count, this.by, this.down));
  }

  toggle(name) {
    const opposite = { right: "wrong", wrong: "right" }[name];
    const others = this.state.only.split(",").filter((other) => other && other !== name && other !== opposite);
    this.ask({ only: (this.state.only.split(",").includes(name) ? others : [...others, name]).join(",") });
  }

  ask(changes) {
    this.set({ ...this.state, ...changes });
    const different = Object.entries(this.state).filter(([name, value]) => value !== DEFAULTS[name]);
    try {
      history.replaceState(null, "", "#" + new URLSearchParams(different));
    } catch {
      // A sandboxed frame has no URL to update.
    }
  }

  set(state) {
    const before = this.state || {};
    const isNew = (...names) => names.some((name) => before[name] !== state[name]);
    this.state = state;
    if (isNew("find", "only", "suite", "from", "by", "down")) this.showList();
    for (const row of this.list.querySelectorAll(".row")) row.setAttribute("aria-selected", String(row.dataset.number === state.episode));
    this.list.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
    if (isNew("episode", "with")) this.showDetail();
  }

  showList() {
    const { state, index } = this;
    const { found, counts } = (this.result = select(index, state));
    for (const name of ["suite", "from", "by"]) this[name].value = state[name];
    if (this.find.value !== state.find) this.find.value = state.find;
    this.down.textContent = state.down ? "↓" : "↑";
    for (const [name, made] of this.flags) {
      made.setAttribute("aria-pressed", String(state.only.split(",").includes(name)));
      made.querySelector(".count").textContent = counts[name].toLocaleString("en");
    }
    const all = plural(index.rows.length, "episode");
    this.count.textContent = found.length === index.rows.length ? all : `${found.length.toLocaleString("en")} of ${all}`;
    this.empty.hidden = found.length > 0;
    this.list.replaceChildren();
    this.addRows();
  }

  addRows() {
    const first = this.list.querySelectorAll(".row").length;
    this.list.querySelector(".more-rows")?.remove();
    const { found } = this.result;
    this.list.append(...found.slice(first, first + MAX_ROWS).map((row) => this.rowElement(row)));
    if (found.length > first + MAX_ROWS) this.list.append(button("more-rows", "Show more", () => this.addRows()));
  }

  rowElement(row) {
    const figures = [visibleText(row.source), row.reward === null ? "not scored" : "reward " + Number(row.reward.toFixed(2))];
    if (row.advantage !== null) figures.push("adv. " + (row.advantage < 0 ? "-" : "+") + Math.abs(row.advantage).toFixed(2));
    const made = element("div", "row",
      element("span", "sign " + row.verdict, this.index.marks[row.verdict]),
      element("span", "asked", element("bdi", "", visibleText(row.question.slice(0, 200)))),
      element("span", "answered", element("bdi", "", row.answer === null ? "no answer" : visibleText(row.answer.slice(0, 100)))),
      element("span", "figures", element("bdi", "", figures.join(" · "))));
    made.dataset.number = row.number;
    made.setAttribute("role", "option");
    return made;
  }

  async showDetail() {
    const { state, index } = this;
    const opening = ++this.opening;
    const numbers = [state.episode, state.with].filter((number) => rowOf(index, number)).map(Number);
    if (!numbers.length) {
      const why = state.episode === "missing" ? "This page does not have the episode in the URL. " : "";
      return this.detail.replaceChildren(element("p", "hint", why + "Choose an episode in the list."));
    }
    let shown;
    try {
      const episodes = await Promise.all(numbers.map((number) => openEpisode(index, number)));
      const articles = episodes.map((episode) => episodeElement(index, episode));
      shown = [this.comparing(index.rows[numbers[0]]), element("div", articles.length > 1 ? "pair" : "single", ...articles)];
    } catch (error) {
      shown = [element("p", "problem", "This episode cannot be unpacked: the file is damaged. Create it again.")];
    }
    if (opening !== this.opening) return; // superseded by another choice
    this.detail.replaceChildren(...shown);
    this.detail.scrollTop = 0;
  }

  // Selects another episode of the same question for comparison.
  comparing(row) {
    const { rows, marks } = this.index;
    const others = rows.filter((other) => other !== row && other.asked === row.asked);
    if (!others.length) return "";
    const options = others.slice(0, MAX_OTHERS).map((other) => [String(other.number), `${other.source}: ${marks[other.verdict]} ${other.answer ?? "no answer"}`]);
    const select = picker("others", "Compare with another episode of this question", [["", `${others.length} more of this question …`], ...options],
      (number) => this.ask({ with: number }));
    select.value = this.state.with;
    return element("div", "comparing", element("label", "", "compare with ", select));
  }

  onKey(event) {
    const isTyping = event.target === this.find;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/" && !isTyping) this.find.focus();
    else if (event.key === "Escape" && isTyping) this.list.focus();
    else if (step && event.target.tagName !== "SELECT" && !this.detail.contains(event.target)) {
      const { found } = this.result;
      const place = found.findIndex((row) => String(row.number) === this.state.episode) + step;
      if (found[place]) this.ask({ episode: String(found[place].number), with: "" });
    } else return;
    event.preventDefault();
  }
}

async function begin() {
  const waiting = document.getElementById("waiting");
  try {
    const index = await unpack("index");
    learnSuspects(index.suspects);
    index.rows.forEach((row, number) => Object.assign(row, {
      number,
      asked: JSON.stringify([row.suite, row.id, row.question]),
      words: (row.question + "\n" + (row.answer ?? "")).toLowerCase(),
    }));
    new Page(index);
  } catch (error) {
    waiting.textContent = "This page cannot be unpacked. The file is damaged, or the browser is too old: use Chrome 123, Firefox 120, Safari 17.5 or later.";
    throw error;
  }
  waiting.remove();
  document.body.dataset.ready = "yes";
}

begin();
