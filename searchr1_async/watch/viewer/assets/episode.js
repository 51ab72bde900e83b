// Renders one episode.

const LABELS = { thought: "thought", call: "tool call", answer: "answer" };

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function signed(value) {
  return (value < 0 ? "-" : "+") + Math.abs(value).toFixed(2);
}

function episodeElement(index, number, { strings, episode }) {
  const { columns } = index;
  const limit = index.limits.line;
  const question = index.questions[columns.question[number]];
  const verdict = columns.verdict[number];
  const golden = episode.golden.map((place) => strings[place]);
  const made = element("article", "episode");
  const source = index.sources[columns.source[number]].name;
  made.append(element("div", "source", isolated("bdi", "", visibleText(source))));
  made.append(line(strings[episode.question], limit, "h2", "question-text"));
  const answers = element("div", "facts", "golden answer: ");
  golden.slice(0, 20).forEach((answer, place) => answers.append(place ? " or " : "", line(answer, limit)));
  if (golden.length > 20) answers.append(` or ${golden.length - 20} more`);
  made.append(answers);
  const said = element("div", "verdict " + verdict, index.marks[verdict] + " ", episode.answer === null ? "no answer" : "answer: ");
  if (episode.answer !== null) said.append(line(strings[episode.answer], limit));
  made.append(said);
  made.append(element("div", "facts", line(strings[episode.rewardWords], limit), ` · stopped (${episode.stop}): ${index.stops[episode.stop]}`));
  if (episode.error !== null) made.append(element("div", "problem", line(strings[episode.error], limit)));
  const advantage = columns.advantage[number];
  made.append(element("div", "facts",
    advantage === null ? "" : `advantage ${signed(advantage)} · `,
    `${plural(columns.turns[number], "turn")} · ${plural(columns.tokens[number], "token")}, ${episode.wrote.toLocaleString("en")} of them sampled`,
    columns.seconds[number] === null ? "" : ` · ${columns.seconds[number].toFixed(1)} s`,
    " · ", line(index.suites[question[1]], limit), " · ", line(question[0], limit)));
  const learned = { true: " trained", false: " dropped", null: "" }[String(episode.learned)];
  made.append(element("div", "learning" + learned, line(strings[episode.learning], limit)));
  if (episode.turns.some((turn) => turn.tokens !== null)) made.append(legend(index));
  if (episode.given !== null) made.append(givenElement(index, strings, episode.given, golden));
  made.append(masked(index, strings, episode.prompt, "prompt"));
  episode.turns.forEach((turn, place) => made.append(turnElement(index, strings, turn, place + 1, golden)));
  return made;
}

function legend(index) {
  const made = element("div", "legend", "token probability at sampling: likely ");
  for (let shade = 0; shade <= index.levels.length; shade++) {
    const percent = (level) => Math.round(100 * level) + "%";
    const isLast = shade === index.levels.length;
    made.append(element("span", "t" + shade, isLast ? "< " + percent(index.levels[shade - 1]) : "≥ " + percent(index.levels[shade])), " ");
  }
  made.append("unlikely");
  return made;
}

function turnElement(index, strings, turn, number, golden) {
  const head = element("div", "head", `turn ${number} · ${plural(turn.count, "token")} · weights after step ${turn.version}`);
  if (turn.seconds !== null) head.append(` · ${turn.seconds.toFixed(1)} s`);
  if (turn.truncated) head.append(" · ", element("span", "problem", "cut at the token limit"));
  const body = element("div");
  clippedInto(body, strings[turn.text], index.limits.text, (text) => coloured(index, text, turn));
  const made = element("section", "turn", head, body);
  if (turn.call !== null) made.append(...callElements(index, strings, turn.call, golden));
  made.append(masked(index, strings, turn.appended, "appended to the turn"));
  return made;
}

// A turn's text by kind, split at token boundaries, each token shaded.
function coloured(index, text, turn) {
  const made = element("pre", "said");
  made.dir = "auto";
  const [lengths, values] = turn.tokens || [[text.length], [null]];
  let at = 0, token = 0, left = lengths.length ? lengths[0] : text.length;
  for (const [kind, length] of turn.kinds) {
    const end = Math.min(at + length, text.length);
    if (at >= end) break;
    const stretch = element("span", "stretch " + kind, LABELS[kind] ? element("span", "tag", LABELS[kind]) : null);
    while (at < end) {
      while (left === 0 && token + 1 < lengths.length) left = lengths[++token];
      const taken = left === 0 ? end - at : Math.min(left, end - at); // the rest after the last known token is one piece
      addToken(index, stretch, text.slice(at, at + taken), left === 0 ? null : values[token]);
      at += taken;
      left -= Math.min(left, taken);
    }
    made.append(stretch);
  }
  return made;
}

function addToken(index, parent, text, thousandths) {
  if (thousandths === null) return addVisible(parent, text);
  const logprob = -thousandths / 1000;
  const shade = index.logLevels.filter((bound) => logprob < bound).length;
  const span = addVisible(element("span", "t" + shade), text);
  span.title = `log-probability ${logprob.toFixed(3)}, probability ${(100 * Math.exp(logprob)).toFixed(1)} %`;
  parent.append(span);
  return parent;
}

// Passages given in the prompt.
function givenElement(index, strings, given, golden) {
  const found = given.problem === null
    ? callElements(index, strings, given, golden)
    : [element("div", "problem", "none: ", line(strings[given.problem], index.limits.line))];
  return element("section", "turn", element("div", "head", "given with the question"), ...found);
}

function callElements(index, strings, call, golden) {
  const limit = index.limits.line;
  if (call.problem !== null) return [element("div", "problem", "malformed call: ", line(strings[call.problem], limit))];
  if (!call.results.length) {
    const asked = element("div", "soft", "queries: ");
    call.queries.forEach((query, place) => asked.append(place ? ", " : "", line(strings[query], limit)));
    asked.append("; the search was not run");
    return [asked];
  }
  return call.results.map((found, place) => {
    const seconds = call.seconds === null ? "" : `, ${call.seconds.toFixed(2)} s`;
    const query = call.queries[place] === undefined ? "" : strings[call.queries[place]];
    const made = element("details", "search",
      element("summary", "", "search: ", line(query, limit), ` (${plural(found.length, "passage")}${seconds})`));
    // Built when expanded.
    made.addEventListener("toggle", () => {
      for (const [title, text, score] of found) {
        const passage = element("div", "passage", element("strong", "", line(strings[title], limit)), " ",
          element("span", "soft", score === null ? "" : score.toFixed(3)), element("br"));
        passage.dir = "auto";
        clippedInto(passage, strings[text], index.limits.passage, (shown) => highlighted(element("span"), shown, golden));
        made.append(passage);
      }
    }, { once: true });
    return made;
  });
}

// Tokens that the model read but did not sample, greyed out.
function masked(index, strings, tokens, name) {
  if (tokens === null) return "";
  const said = `${name}: ${plural(tokens[0], "token")}, not trained on`;
  if (tokens[1] === null) return element("div", "masked", said);
  const made = element("details", "masked", element("summary", "", said));
  made.addEventListener("toggle", () => {
    clippedInto(made, strings[tokens[1]], index.limits.text, (text) => isolated("pre", "said", text));
  }, { once: true });
  return made;
}
