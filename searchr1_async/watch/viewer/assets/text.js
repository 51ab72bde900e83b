// Untrusted text as text nodes, never markup. Invisible characters are labelled, by the table from Python.

let suspects = null; // a pattern
let kept = "";
let names = {};

function learnSuspects(table) {
  const code = (point) => "\\u{" + point.toString(16) + "}";
  suspects = new RegExp("[" + table.ranges.map(([first, last]) => code(first) + "-" + code(last)).join("") + "]", "gu");
  kept = table.kept;
  names = table.names;
}

function suspectLabel(char) {
  const point = char.codePointAt(0);
  if (point < 0x20) return String.fromCharCode(0x2400 + point); // Unicode control pictures
  return point === 0x7f ? "␡" : "U+" + point.toString(16).toUpperCase().padStart(4, "0");
}

// Calls back for each plain part and each suspect character.
function scan(text, onText, onSuspect) {
  text = text.replaceAll("\r\n", "\n");
  let end = 0;
  for (const match of text.matchAll(suspects)) {
    if (kept.includes(match[0])) continue;
    if (match.index > end) onText(text.slice(end, match.index));
    onSuspect(match[0]);
    end = match.index + match[0].length;
  }
  if (end < text.length) onText(text.slice(end));
}

function element(tag, css, ...children) {
  const made = document.createElement(tag);
  if (css) made.className = css;
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

// Appends `text` to `parent`, with a label for each suspect character.
function addVisible(parent, text) {
  scan(
    text,
    (part) => parent.append(document.createTextNode(part)),
    (char) => {
      const mark = element("span", "mark", suspectLabel(char));
      const point = char.codePointAt(0).toString(16).toUpperCase();
      mark.title = ("U+" + point.padStart(4, "0") + " " + (names[point] || "")).trim();
      parent.append(mark);
    },
  );
  return parent;
}

// As plain text, for lists, options and titles.
function visibleText(text) {
  let out = "";
  scan(text, (part) => (out += part), (char) => (out += "[" + suspectLabel(char) + "]"));
  return out;
}

function isolated(tag, css, text) {
  const made = element(tag, css);
  made.dir = "auto";
  return addVisible(made, text);
}

// A single-line text; the excess is behind a button.
function line(text, limit, tag = "bdi", css = "") {
  return clippedInto(element("span"), text, limit, (shown) => isolated(tag, css, shown));
}

// `make(text)` for the first `limit` characters, and a button for the rest.
function clippedInto(parent, text, limit, make) {
  const cut = cutPlace(text, limit);
  parent.append(make(text.slice(0, cut)));
  if (cut < text.length) {
    const left = (text.length - cut).toLocaleString("en");
    const button = element("button", "more", `show ${left} more characters`);
    button.type = "button";
    button.addEventListener("click", () => button.replaceWith(isolated("span", "said", text.slice(cut))));
    parent.append(button);
  }
  return parent;
}

function cutPlace(text, limit) {
  if (text.length <= limit) return text.length;
  const last = text.charCodeAt(limit - 1);
  return last >= 0xd800 && last < 0xdc00 ? limit - 1 : limit; // do not split a surrogate pair
}

// `text` with whole-word, case-insensitive matches of `words` in <mark>.
function highlighted(parent, text, words) {
  const wanted = [...new Set(words.map((word) => word.trim()).filter((word) => word && word.length <= text.length))].sort((a, b) => b.length - a.length);
  if (!wanted.length) return addVisible(parent, text);
  const escaped = wanted.map((word) => word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}_])(?:${escaped.join("|")})(?![\\p{L}\\p{N}_])`, "giu");
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    addVisible(parent, text.slice(end, match.index));
    parent.append(addVisible(element("mark"), match[0]));
    end = match.index + match[0].length;
  }
  return addVisible(parent, text.slice(end));
}
