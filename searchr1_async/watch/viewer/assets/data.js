// Page data: the index in memory, and chunks of episodes that are unpacked on demand.

const KEPT_CHUNKS = 8;
const chunks = new Map(); // number -> promise; least recently used first

async function unpack(name) {
  const block = document.getElementById(name);
  const text = atob(block.textContent);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function openEpisode(index, number) {
  const chunk = Math.floor(number / index.chunk);
  const found = chunks.get(chunk) || unpack("chunk-" + chunk);
  chunks.delete(chunk);
  chunks.set(chunk, found);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
  const { strings, episodes } = await found;
  return { strings, episode: episodes[number % index.chunk] };
}

const SORTS = {
  order: ["rollout order", null],
  reward: ["reward", (columns, n) => columns.reward[n]],
  advantage: ["size of advantage", (columns, n) => (columns.advantage[n] === null ? null : Math.abs(columns.advantage[n]))],
  turns: ["turns", (columns, n) => columns.turns[n]],
  tokens: ["tokens", (columns, n) => columns.tokens[n]],
  seconds: ["seconds", (columns, n) => columns.seconds[n]],
};

// Default state of the list; the URL's hash encodes the differences from it.
const DEFAULTS = { find: "", only: [], suite: "", from: "", by: "order", down: false, episode: null, with: null, isMissing: false };

// Lower-case texts by question and by episode; built on the first search.
let haystacks = null;

function makeHaystacks(index) {
  const questions = index.questions.map(([, , text]) => text.toLowerCase());
  return index.columns.question.map((question, n) => questions[question] + "\n" + (index.columns.answer[n] || "").toLowerCase());
}

// Episode numbers by sort order, cached.
const orders = new Map();

function order(index, by, down) {
  const name = by + (down ? " down" : "");
  if (orders.has(name)) return orders.get(name);
  const { columns } = index;
  const value = SORTS[by][1];
  const numbers = Uint32Array.from(columns.flags.keys());
  if (value === null) {
    if (down) numbers.reverse();
  } else {
    // Episodes without a value come last in both directions.
    const keys = Float64Array.from(columns.flags, (_, n) => {
      const found = value(columns, n);
      return found === null ? Infinity : down ? -found : found;
    });
    numbers.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] - keys[b]));
  }
  orders.set(name, numbers);
  return numbers;
}

// Numbers of the matching episodes in order, and for each flag how many of them have it.
function select(index, state) {
  const { columns, questions, sources } = index;
  const flagNames = Object.keys(index.flags);
  const mask = state.only.reduce((sum, name) => sum | (1 << flagNames.indexOf(name)), 0);
  const suite = state.suite === "" ? null : index.suites.indexOf(state.suite);
  const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length && haystacks === null) haystacks = makeHaystacks(index);
  const isWanted = sources.map((source, place) =>
    state.from === "" || (state.from === "training" ? !source.isEvaluation : state.from === "evaluations" ? source.isEvaluation : state.from === String(place)));
  const counts = flagNames.map(() => 0);
  const found = [];
  for (const n of order(index, state.by, state.down)) {
    if (!isWanted[columns.source[n]]) continue;
    if (suite !== null && questions[columns.question[n]][1] !== suite) continue;
    if (words.length && !words.every((word) => haystacks[n].includes(word))) continue;
    const flags = columns.flags[n];
    if ((flags & mask) !== mask) continue;
    found.push(n);
    for (let place = 0; place < counts.length; place++) if (flags & (1 << place)) counts[place]++;
  }
  return { found, counts: Object.fromEntries(flagNames.map((name, place) => [name, counts[place]])) };
}

function toHash(state) {
  const out = new URLSearchParams();
  for (const [name, nothing] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (Array.isArray(value) ? value.length : value !== nothing) out.set(name, value === true ? "1" : String(value));
  }
  return "#" + out;
}

// Lone surrogates, possible in model output, become U+FFFD, as in a URL.
function wellFormed(text) {
  return text.replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
}

// The number of the episode that an external link names by evaluation, suite, question and sample; null if it is absent. Numbers
// are specific to this page and may change when it is rewritten.
function named(index, { system, suite, question, sample }) {
  const { columns, questions, sources, suites } = index;
  const isAsked = questions.map(([id, of]) => wellFormed(id) === question && wellFormed(suites[of]) === suite);
  const isFrom = sources.map(({ label }) => label !== null && wellFormed(label) === system);
  for (let n = 0; n < columns.question.length; n++) {
    if (isAsked[columns.question[n]] && isFrom[columns.source[n]] && String(columns.member[n] ?? 0) === sample) return n;
  }
  return null;
}

function namedInHash(given, index) {
  if (!given.has("system") || !given.has("question")) return null;
  const asked = { system: given.get("system"), suite: given.get("in"), question: given.get("question"), sample: given.get("sample") || "0" };
  const episode = named(index, asked);
  const beside = { ...asked, system: given.get("beside"), sample: given.get("beside-sample") || "0" };
  return { ...DEFAULTS, only: [], episode, with: episode === null || !given.has("beside") ? null : named(index, beside), isMissing: episode === null };
}

// Hashes are untrusted: invalid parts are ignored.
function fromHash(hash, index) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const found = namedInHash(given, index);
  if (found !== null) return found;
  const number = (name) => (/^\d{1,9}$/.test(given.get(name) || "") && Number(given.get(name)) < index.columns.flags.length ? Number(given.get(name)) : null);
  const from = given.get("from") || "";
  const { question } = index.columns;
  const episode = number("episode");
  const isSame = episode !== null && number("with") !== null && question[episode] === question[number("with")];
  return {
    find: (given.get("find") || "").slice(0, 1000),
    only: [...new Set((given.get("only") || "").split(","))].filter((name) => Object.hasOwn(index.flags, name)),
    suite: index.suites.includes(given.get("suite")) ? given.get("suite") : "",
    from: ["training", "evaluations"].includes(from) || (/^\d{1,9}$/.test(from) && Number(from) < index.sources.length) ? from : "",
    by: Object.hasOwn(SORTS, given.get("by") || "") ? given.get("by") : "order",
    down: given.get("down") === "1",
    episode,
    with: isSame ? number("with") : null,
    isMissing: false,
  };
}
