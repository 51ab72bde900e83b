// Virtual list: only visible rows are in the DOM.

const ROW = 52; // pixels, as in the stylesheet
const AROUND = 6; // extra rows above and below the visible ones

class List {
  constructor(index, onChoose) {
    this.index = index;
    this.onChoose = onChoose;
    this.numbers = [];
    this.chosen = null;
    this.inside = element("div", "rows");
    this.box = element("div", "list", this.inside);
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "listbox");
    this.box.setAttribute("aria-label", "Episodes");
    this.box.addEventListener("scroll", () => this.draw());
    this.inside.addEventListener("click", (event) => {
      const row = event.target.closest("[data-number]");
      if (row) this.onChoose(Number(row.dataset.number));
    });
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  show(numbers, chosen) {
    this.numbers = numbers;
    this.places = new Map(numbers.map((number, place) => [number, place]));
    this.inside.style.height = numbers.length * ROW + "px";
    this.choose(chosen);
  }

  choose(number) {
    this.chosen = number;
    const place = this.places.get(number);
    if (place !== undefined) {
      const top = place * ROW;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
    }
    this.draw();
  }

  // The number `by` rows from the chosen one, else the first.
  beside(by) {
    if (!this.numbers.length) return null;
    const place = this.places.get(this.chosen);
    if (place === undefined) return this.numbers[0];
    return this.numbers[Math.max(0, Math.min(this.numbers.length - 1, place + by))];
  }

  pageRows() {
    return Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - AROUND);
    const last = Math.min(this.numbers.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + AROUND);
    const rows = [];
    for (let place = first; place < last; place++) rows.push(this.row(place));
    this.inside.replaceChildren(...rows);
    if (this.places.has(this.chosen)) this.box.setAttribute("aria-activedescendant", "row-" + this.chosen);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(place) {
    const { columns, marks, questions, sources } = this.index;
    const number = this.numbers[place];
    const verdict = columns.verdict[number];
    const answer = columns.answer[number];
    const reward = columns.reward[number];
    const advantage = columns.advantage[number];
    const made = element("div", "row",
      element("span", "sign " + verdict, marks[verdict]),
      element("span", "asked", element("bdi", "", visibleText(questions[columns.question[number]][2].slice(0, 200)))),
      element("span", "answered", element("bdi", "", answer === null ? "no answer" : visibleText(answer.slice(0, 100)))),
      element("span", "figures",
        element("bdi", "from", visibleText(sources[columns.source[number]].name)),
        reward === null ? " · not scored" : " · reward " + Number(reward.toFixed(2)),
        advantage === null ? "" : " · adv. " + signed(advantage)));
    made.id = "row-" + number;
    made.dataset.number = number;
    made.style.top = place * ROW + "px";
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", String(number === this.chosen));
    made.setAttribute("aria-setsize", String(this.numbers.length));
    made.setAttribute("aria-posinset", String(place + 1));
    return made;
  }
}
