// The page: filters, list, the open episode and the one to compare with.

const MAX_OTHERS = 200;

function option(value, text) {
  const made = element("option", "", text);
  made.value = value;
  return made;
}

class Page {
  constructor(index) {
    this.index = index;
    this.state = { ...DEFAULTS };
    this.list = new List(index, (number) => this.ask({ episode: number, with: null }));
    this.detail = element("main", "detail");
    this.detail.tabIndex = -1;
    this.opening = 0;
    this.buildControls();
    const notes = element("p", "notes", index.notes.join(" "), " Keys: ↑ ↓ to move, / to search.");
    const title = element("h1", "", isolated("bdi", "", visibleText(index.title)));
    this.empty = element("div", "empty", "No matching episodes. ");
    const all = element("button", "", "Show all");
    all.type = "button";
    all.addEventListener("click", () => this.ask({ ...DEFAULTS, episode: this.state.episode, with: this.state.with }));
    this.empty.append(all);
    const side = element("nav", "side", this.controls, this.empty, this.list.box);
    document.body.append(element("header", "top", title, notes, this.themeButton()), side, this.detail);
    document.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("hashchange", () => this.fromHash());
  }

  buildControls() {
    const { flags, suites, sources } = this.index;
    this.find = element("input", "find");
    this.find.type = "search";
    this.find.placeholder = "Search questions and answers";
    this.find.setAttribute("aria-label", "Search questions and answers");
    this.find.addEventListener("input", () => this.ask({ find: this.find.value }));
    this.flags = new Map(Object.entries(flags).map(([name, words]) => {
      const button = element("button", "flag", words, " ", element("span", "count"));
      button.type = "button";
      button.addEventListener("click", () => this.toggle(name));
      return [name, button];
    }));
    const picker = (name, label, options) => {
      const made = element("select", name, ...options);
      made.setAttribute("aria-label", label);
      made.addEventListener("change", () => this.ask({ [name]: made.value }));
      return made;
    };
    this.suite = picker("suite", "Suite", [option("", "all suites"), ...suites.map((suite) => option(suite, visibleText(suite).slice(0, 60)))]);
    const all = [option("", "steps and evaluations")];
    if (sources.some((source) => source.isEvaluation) && sources.some((source) => !source.isEvaluation)) {
      all.push(option("training", "training"), option("evaluations", "evaluations"));
    }
    this.from = picker("from", "Step or evaluation", [...all, ...sources.map((source, place) => option(String(place), visibleText(source.name).slice(0, 60)))]);
    this.by = picker("by", "Sort by", Object.entries(SORTS).map(([name, [words]]) => option(name, "by " + words)));
    this.by.addEventListener("change", () => this.ask({ down: this.by.value !== "order" })); // largest first
    this.down = element("button", "down");
    this.down.type = "button";
    this.down.addEventListener("click", () => this.ask({ down: !this.state.down }));
    this.count = element("div", "total");
    this.count.setAttribute("aria-live", "polite");
    this.controls = element("div", "controls", this.find, element("div", "flags", ...this.flags.values()),
      element("div", "pickers", this.suite, this.from), element("div", "pickers", this.count, this.by, this.down));
  }

  themeButton() {
    const button = element("button", "theme", "◐");
    button.type = "button";
    button.title = "light or dark";
    button.setAttribute("aria-label", button.title);
    button.addEventListener("click", () => {
      const root = document.documentElement;
      const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = isDark ? "light" : "dark";
    });
    return button;
  }

  toggle(name) {
    const opposite = { right: "wrong", wrong: "right" }[name];
    const without = this.state.only.filter((other) => other !== name && other !== opposite);
    this.ask({ only: this.state.only.includes(name) ? without : [...without, name] });
  }

  fromHash() {
    this.set(fromHash(location.hash, this.index));
  }

  ask(changes) {
    this.set({ ...this.state, isMissing: false, ...changes });
    try {
      history.replaceState(null, "", toHash(this.state));
    } catch {
      // A sandboxed frame has no URL to update.
    }
  }

  set(state) {
    const before = this.state;
    this.state = state;
    const isAsked = (name) => String(before[name]) !== String(state[name]);
    if (!this.result || ["find", "only", "suite", "from", "by", "down"].some(isAsked)) this.showList();
    else this.list.choose(state.episode);
    if (isAsked("episode") || isAsked("with") || isAsked("isMissing")) this.showDetail();
  }

  showList() {
    const { state, index } = this;
    this.result = select(index, state);
    if (this.find.value !== state.find) this.find.value = state.find;
    this.suite.value = state.suite;
    this.from.value = state.from;
    this.by.value = state.by;
    this.down.textContent = state.down ? "↓" : "↑";
    this.down.title = state.down ? "descending; click for ascending" : "ascending; click for descending";
    this.down.setAttribute("aria-label", this.down.title);
    for (const [name, button] of this.flags) {
      const isPressed = state.only.includes(name);
      button.setAttribute("aria-pressed", String(isPressed));
      button.querySelector(".count").textContent = this.result.counts[name].toLocaleString("en");
      button.classList.toggle("none", !isPressed && this.result.counts[name] === 0);
    }
    const shown = this.result.found.length, all = index.columns.flags.length;
    this.count.textContent = shown === all ? plural(all, "episode") : `${shown.toLocaleString("en")} of ${plural(all, "episode")}`;
    this.empty.hidden = shown > 0;
    this.list.box.hidden = shown === 0;
    this.list.show(this.result.found, state.episode);
  }

  async showDetail() {
    const { state, index } = this;
    const opening = ++this.opening;
    if (state.episode === null) {
      const missing = "This page does not have the episode in the URL. ";
      this.detail.replaceChildren(element("p", "hint", (state.isMissing ? missing : "") + "Choose an episode in the list."));
      return;
    }
    const isPair = state.with !== null && state.with !== state.episode;
    const numbers = isPair ? [state.episode, state.with] : [state.episode];
    let opened;
    try {
      opened = await Promise.all(numbers.map((number) => openEpisode(index, number)));
    } catch (error) {
      opened = null;
    }
    if (opening !== this.opening) return; // superseded by another choice
    if (opened === null) {
      this.detail.replaceChildren(element("p", "problem", "This episode cannot be unpacked: the file is damaged. Create it again."));
      return;
    }
    const articles = numbers.map((number, place) => episodeElement(index, number, opened[place]));
    this.detail.replaceChildren(this.comparing(), element("div", isPair ? "pair" : "single", ...articles));
    this.detail.scrollTop = 0;
  }

  // Selects another episode of the same question for comparison.
  comparing() {
    const { columns, sources, marks } = this.index;
    const { episode } = this.state;
    const others = [];
    for (let n = 0; n < columns.question.length && others.length <= MAX_OTHERS; n++) {
      if (n !== episode && columns.question[n] === columns.question[episode]) others.push(n);
    }
    if (!others.length) return element("div", "comparing", "The only episode of this question.");
    const select = element("select", "others", option("", `${others.length > MAX_OTHERS ? "over " + MAX_OTHERS : others.length} more of this question …`));
    select.setAttribute("aria-label", "Compare with another episode of this question");
    for (const n of others.slice(0, MAX_OTHERS)) {
      const reward = columns.reward[n] === null ? "" : `, reward ${Number(columns.reward[n].toFixed(2))}`;
      const answer = columns.answer[n] === null ? "no answer" : visibleText(columns.answer[n].slice(0, 40));
      select.append(option(String(n), `${visibleText(sources[columns.source[n]].name)}: ${marks[columns.verdict[n]]} ${answer}${reward}`));
    }
    select.value = this.state.with === null ? "" : String(this.state.with);
    select.addEventListener("change", () => this.ask({ with: select.value === "" ? null : Number(select.value) }));
    return element("div", "comparing", element("label", "", "compare with ", select));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target === this.find;
    if (event.key === "/" && !isTyping) this.find.focus();
    else if (event.key === "Escape" && isTyping) this.list.box.focus();
    else if (isTyping && !["ArrowDown", "ArrowUp"].includes(event.key)) return;
    else if (event.target.tagName === "SELECT" || this.detail.contains(event.target)) return;
    else {
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: this.list.pageRows(), PageUp: -this.list.pageRows(), Home: -Infinity, End: Infinity };
      if (!Object.hasOwn(steps, event.key)) return;
      const number = this.list.beside(steps[event.key]);
      if (number !== null) this.ask({ episode: number, with: null });
    }
    event.preventDefault();
  }
}

async function begin() {
  const waiting = document.getElementById("waiting");
  if (typeof DecompressionStream === "undefined") {
    waiting.textContent = "This browser is too old to unpack the page: use Chrome 113, Firefox 113, Safari 16.4 or later.";
    return;
  }
  let index;
  try {
    index = await unpack("index");
  } catch (error) {
    waiting.textContent = "This page cannot be unpacked: the file is damaged or incomplete. Create it again.";
    return;
  }
  learnSuspects(index.suspects);
  waiting.remove();
  const page = new Page(index);
  page.fromHash();
  if (page.state.episode === null) {
    if (page.result.found.length && !page.state.isMissing) page.set({ ...page.state, episode: page.result.found[0] });
    else page.showDetail();
  }
  document.body.dataset.ready = "yes";
}

begin();
