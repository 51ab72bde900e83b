// One episode as elements. Untrusted text becomes text nodes, never markup; invisible characters are labelled, by Python's table.

const LABELS = { thought: "thought", call: "tool call", answer: "answer" };
let suspects = null; // a pattern
let kept = "";

function learnSuspects(table) {
  const code = (point) => "\\u{" + point.toString(16) + "}";
  suspects = new RegExp("([" + table.ranges.map(([first, last]) => code(first) + "-" + code(last)).join("") + "])", "u");
  kept = table.kept;
}

function suspectLabel(char) {
  const point = char.codePointAt(0);
  if (point < 0x20) return String.fromCharCode(0x2400 + point); // Unicode control pictures
  return point === 0x7f ? "␡" : "U+" + point.toString(16).toUpperCase().padStart(4, "0");
}

// The text in parts, with whether each is a suspect character.
function scan(text) {
  return text.replaceAll("\r\n", "\n").split(suspects).map((part, place) => [part, place % 2 === 1 && !kept.includes(part)]);
}

function element(tag, css, ...children) {
  const made = document.createElement(tag);
  if (css) made.className = css;
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function addVisible(parent, text) {
  parent.append(...scan(text).map(([part, isSuspect]) => (isSuspect ? element("span", "mark", suspectLabel(part)) : part)));
  return parent;
}

// As plain text, for lists and options.
function visibleText(text) {
  return scan(text).map(([part, isSuspect]) => (isSuspect ? "[" + suspectLabel(part) + "]" : part)).join("");
}

function isolated(tag, css, text) {
  const made = addVisible(element(tag, css), text);
  made.dir = "auto";
  return made;
}

// A button that shows the rest of a text.
function restButton(text) {
  if (!text) return null;
  const button = element("button", "more", `show ${text.length.toLocaleString("en")} more characters`);
  button.type = "button";
  button.addEventListener("click", () => button.replaceWith(isolated("span", "said", text)));
  return button;
}

// `make(text)` for the first `limit` characters, and a button for the rest.
function clipped(text, limit, make) {
  return [make(text.slice(0, limit)), restButton(text.slice(limit))];
}

function line(index, text) {
  return element("span", "", ...clipped(text, index.limits.line, (shown) => isolated("bdi", "", shown)));
}

// `text` with whole-word, case-insensitive matches of `words` in <mark>.
function highlighted(text, words) {
  const wanted = words.map((word) => word.trim()).filter((word) => word && word.length <= text.length).sort((a, b) => b.length - a.length);
  const made = element("span");
  if (!wanted.length) return addVisible(made, text);
  const escaped = wanted.map((word) => word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  const parts = text.split(new RegExp(`(?<![\\p{L}\\p{N}_])(${escaped.join("|")})(?![\\p{L}\\p{N}_])`, "iu"));
  parts.forEach((part, place) => (place % 2 ? made.append(addVisible(element("mark"), part)) : addVisible(made, part)));
  return made;
}

function episodeElement(index, episode) {
  const { golden, verdict } = episode;
  const said = element("div", "verdict " + verdict, golden.length ? index.marks[verdict] + " " : "",
    episode.answer === null ? "no answer" : "answer: ", episode.answer === null ? "" : line(index, episode.answer));
  const answers = element("div", "facts", "golden answer: ");
  golden.forEach((answer, place) => answers.append(place ? " or " : "", line(index, answer)));
  return element("article", "episode",
    element("div", "source", line(index, episode.source)),
    element("h2", "question-text", line(index, episode.question)),
    golden.length ? answers : "",
    said,
    element("div", "facts", line(index, episode.outcome)),
    episode.error === null ? "" : element("div", "problem", line(index, episode.error)),
    element("div", "facts", line(index, episode.facts)),
    element("div", "learning" + { true: " trained", false: " dropped", null: "" }[String(episode.learned)], line(index, episode.learning)),
    episode.turns.some((turn) => turn.isColoured) ? legend(index) : "",
    episode.given === null ? "" : element("section", "turn", element("div", "head", "given with the question"), ...callElements(index, episode.given, golden)),
    masked(index, episode.prompt),
    ...episode.turns.map((turn) => turnElement(index, turn, golden)));
}

function legend(index) {
  const made = element("div", "legend", "token probability at sampling: likely ");
  const percents = index.levels.map((level) => Math.round(100 * level) + " %");
  percents.forEach((percent, shade) => made.append(element("span", "t" + shade, "≥ " + percent), " "));
  made.append(element("span", "t" + percents.length, "< " + percents.at(-1)), " unlikely");
  return made;
}

function turnElement(index, turn, golden) {
  const said = element("pre", "said");
  said.dir = "auto";
  for (const [kind, pieces] of turn.stretches) {
    const stretch = element("span", "stretch " + kind, LABELS[kind] ? element("span", "tag", LABELS[kind]) : null);
    for (const [text, thousandths] of pieces) stretch.append(...token(index, text, thousandths));
    said.append(stretch);
  }
  return element("section", "turn", element("div", "head", turn.head), said, restButton(turn.rest),
    ...(turn.call === null ? [] : callElements(index, turn.call, golden)), masked(index, turn.appended));
}

function token(index, text, thousandths) {
  if (thousandths === null) return addVisible(element("span"), text).childNodes;
  const probability = Math.exp(thousandths / 1000);
  const span = addVisible(element("span", "t" + index.levels.filter((level) => probability < level).length), text);
  span.title = `log-probability ${(thousandths / 1000).toFixed(3)}, probability ${(100 * probability).toFixed(1)} %`;
  return [span];
}

function callElements(index, call, golden) {
  const problem = call.problem === null ? [] : [element("div", "problem", line(index, call.problem))];
  return problem.concat(call.searches.map(({ query, facts, passages }) => {
    if (!passages) return element("div", "soft", "search: ", line(index, query), ` (${facts})`);
    const made = element("details", "search", element("summary", "", "search: ", line(index, query), ` (${facts})`));
    for (const [title, score, text] of passages) {
      const passage = element("div", "passage", element("strong", "", line(index, title)), " ", element("span", "soft", score), element("br"),
        ...clipped(text, index.limits.passage, (shown) => highlighted(shown, golden)));
      passage.dir = "auto";
      made.append(passage);
    }
    made.open = !golden.length; // without a golden answer, the passages are the only evidence
    return made;
  }));
}

// Tokens that the model read but did not sample, greyed out.
function masked(index, tokens) {
  if (tokens === null) return "";
  const [said, text] = tokens;
  if (text === null) return element("div", "masked", said);
  return element("details", "masked", element("summary", "", said), ...clipped(text, index.limits.text, (shown) => isolated("pre", "said", shown)));
}
